"""Shared by all tests: the repository on the path, no network, one thread for the tiny models."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

torch.set_num_threads(1)  # tensors this small lose more to waking threads than they gain
