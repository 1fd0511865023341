"""Load a model, format prompts, and sample from it with a KV cache written out by hand.

    python sample.py --prompt "Tom has 3 apples and buys 4 more. How many apples does he have?"
    python sample.py --data tiny --limit 20 --n 4 --temperature 0.6 --out out/samples.jsonl

`decode` is the whole loop; it needs `KVLayer` and `prefill`, which stand above it. `generate`
around it forms batches and collects results.
Everything here works on token ids: a prompt is a list of ids, made from the model's own chat
template, and a response is the list of ids that the model sampled. Text is made only to be shown.
"""

import argparse
import hashlib
import inspect
import json
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

# Training a 7B just fits into 80 GB: let blocks grow, so that freed memory leaves no gaps. PyTorch
# reads this at its first use of a GPU.
if "PYTORCH_ALLOC_CONF" not in os.environ:  # its name from 2.9 on, but the older one wins
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from huggingface_hub.utils import enable_progress_bars
from torch.nn import Linear, functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging as transformers_logging

DATA = Path(__file__).resolve().parent / "data"
TINY = DATA / "tiny"  # the embedded model and its questions
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PREFILL_TOKENS = {"cpu": 1024, "cuda": 8192}  # columns x rows that are read at once
TOKEN_BUDGET = 32768  # columns x rows of one batch; Qwen2.5-7B's cache takes 56 KB each: 1.9 GB


class InputError(Exception):
    """Something that the user gave is wrong; the message is one line: what, and what to do."""


def run(main):
    """Call a script's main(); an InputError becomes one line on stderr and exit code 2."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of loading; and of downloads, which we show:
    if not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        enable_progress_bars()
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # Windows, to a file: cp1252 has no root sign
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; what was written so far is kept", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, (InputError, OSError)):  # OSError: a full disk, no permission
            if not out_of_memory(error):
                raise
            error = ("out of memory: lower --micro-batch (training; then --out FOLDER --resume), "
                     "begin anew with a lower --max-new-tokens, or take a smaller model")
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# ---- files -----------------------------------------------------------------------------------


def read_jsonl(path, torn_ok: bool = False, check=None) -> list[dict]:
    """The objects of a JSONL file. A bad line is an InputError that names file and line number.

    torn_ok: the file was growing when a run stopped, so a last line without its newline is left
    out. check(row) returns what is wrong with a row, or None; with it the file must hold a row.
    """
    rows = []
    # Split on \n only: str.splitlines would also cut at U+2028, which GSM8K contains.
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1] if torn_ok else lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error})") from None
        wrong = check and check(row) if isinstance(row, dict) else "expected a JSON object {...}"
        if wrong:
            raise InputError(f"{path}, line {number}: {wrong}")
        rows.append(row)
    if check and not rows:
        raise InputError(f"{path} holds no questions")
    return rows


def write_jsonl(path, rows, indent=None) -> None:
    """Write all rows at once: to a temporary name first, so that `path` is never half a file."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text("".join(json.dumps(row, indent=indent) + "\n" for row in rows))
    temporary.replace(path)


def user_path(name) -> str:
    """A path as it was typed, with ~ expanded and no slash at its end."""
    return str(Path(os.path.expanduser(name))) if name else ""


def is_text(value) -> bool:
    """Whether this is a string that says something, and holds no half of a surrogate pair."""
    return (isinstance(value, str) and value.strip() != ""
            and value == value.encode(errors="ignore").decode())


def load_questions(name, split: str = "train", limit=None, need_answer=False) -> list[dict]:
    """The questions of "tiny", of a set made by data/prepare.py, or of a JSONL file.

    Every row has "question" (str); "answer" (str, the bare final answer) may be absent unless
    need_answer: UPFT never reads it. `split` chooses the file where a name has several.
    """
    path = Path(user_path(name))
    if not path.suffix and not path.is_file():
        path = TINY / f"{split}.jsonl" if name == "tiny" else DATA / f"{name}_{split}.jsonl"
    if not path.is_file():
        raise InputError(f"no question file {path}: --data takes tiny, the name of a set that "
                         "`python data/prepare.py NAME` made, or the path of a JSONL file")

    def check(row):
        """What is wrong with a row, or None."""
        if not is_text(row.get("question")):
            return 'no "question", or one that holds half a surrogate pair'
        answer = "" if row.get("answer") is None else str(row["answer"]).strip()
        if need_answer and not answer:
            return 'no "answer", which is needed here'
        if need_answer and "####" in answer:
            return '"answer" is a whole solution, not the final answer alone: see data/prepare.py'

    return [row | {"answer": str(row["answer"])} if row.get("answer") is not None else row
            for row in read_jsonl(path, check=check)[:limit]]


# ---- model and prompt ------------------------------------------------------------------------


def choose_dtype(dtype: str, device: str, small: bool) -> tuple[torch.dtype, str]:
    """--dtype auto: bfloat16 wherever the processor is fast at it. Returns dtype and the reason."""
    if dtype != "auto":
        return getattr(torch, dtype), "as asked"
    if small:
        return torch.float32, "the model is small"
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        fast = able.get("amx_tile") or able.get("avx512_bf16")
    if fast:
        return torch.bfloat16, f"this {device} has instructions for it"
    return torch.float32, f"no fast bfloat16 on this {device}"


def load_model(name, device: str = "auto", dtype: str = "auto"):
    """(model, tokenizer) of "tiny", a local folder or a hub name, ready to sample from."""
    path = str(TINY) if str(name) == "tiny" else os.path.expanduser(str(name))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if path.startswith((".", "/")) and not os.path.isdir(path):  # not to be asked of the hub
            raise InputError("there is no such folder")
        if torch.device(device).type not in PREFILL_TOKENS:
            raise InputError("only cpu and cuda have what sampling needs, such as float64")
        if device.startswith("cuda:"):  # a graph is made on the current one
            torch.cuda.set_device(device)
        tokenizer = AutoTokenizer.from_pretrained(path)
        if not tokenizer.chat_template:
            raise InputError("it has no chat template; UPFT needs an instruction-tuned model")
        prompt_ids(tokenizer, "?")  # may fail: a template is a program
        end_of_turn(tokenizer)
        chosen, why = choose_dtype(dtype, device, is_tiny(path))
        # Read in this dtype. model.to(chosen) would round the rotary frequencies, buffers in
        # float32, and positions would be off by a radian after 1,000; and buffers that were made in
        # bfloat16, such as Gemma's scale of embeddings, would stay rounded.
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=chosen, output_loading_info=True)
        if info["missing_keys"]:  # the library would go on with random ones
            raise InputError(f"its files lack weights: {sorted(info['missing_keys'])[0]}, ...")
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
        if set(kinds) - {f"{kind}_attention" for kind in ("full", "sliding", "chunked")}:
            raise InputError("some of its layers keep a state that is not keys and values")
        if hasattr(model, "hf_quantizer") or any("scale" in k for k in info["unexpected_keys"]):
            raise InputError("its weights are quantised; take a model whose weights are not")
        for parameter in model.parameters():  # some that the library keeps in float32
            parameter.data = parameter.data.to(chosen)
        model = model.to(device)
        if model.device.type == "cuda":
            fuse_norms(model)
    except Exception as error:  # each library that takes part has its own
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"cannot load the model {name} on {device}: {reason}") from None
    print(f"{name}: {model.num_parameters() / 1e6:,.1f}M parameters, {model.device}, "
          f"{str(chosen).removeprefix('torch.')} ({why})", file=sys.stderr)
    return model.eval(), tokenizer


def fuse_norms(model) -> None:
    """Make every RMSNorm of the Llama kind one kernel, where the library's code launches eight.

    On an H100 this takes 15 to 36 % off a decoding step of a 0.5B, and 7 to 12 % off decoding and
    training a 7B; a CPU gains nothing. Others stay as they are: Gemma's, which add 1 to the weight
    and call their epsilon otherwise, and Cohere's, which subtract the mean and are no RMSNorm.
    """
    def forward(self, hidden):
        """(..., H) -> (..., H), rounded once; most of the library's round twice."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(forward, module)  # a deepcopy uses its own weights


def is_tiny(model_name) -> bool:
    """Whether this is the embedded model or one tuned from it: their default values are its own."""
    folder = TINY if str(model_name) == "tiny" else Path(user_path(model_name))
    template = folder / "chat_template.jinja"  # whose first line says whose it is
    return template.is_file() and b"sample.is_tiny" in template.read_bytes()


def fill_defaults(args, **defaults) -> None:
    """Fill in the values that suit the model for flags not given; then InputError for a senseless
    value of any flag that the scripts share."""
    defaults |= dict(instruction="" if is_tiny(args.model) else INSTRUCTION,
                     max_new_tokens=160 if is_tiny(args.model) else 512,
                     temperature=0.6 if getattr(args, "n", 1) > 1 else 0.0)
    vars(args).update((k, v) for k, v in defaults.items() if getattr(args, k) is None)
    for names, fits, rule in (
            ("n limit eval_limit max_new_tokens token_budget prefix epochs batch_size micro_batch "
             "samples questions rollouts lr clip top_p", lambda x: 0 < x < float("inf"),
             "must be above 0 and finite"),
            ("top_p structure warmup", lambda x: 0 <= x <= 1, "must lie between 0 and 1"),
            ("temperature", lambda x: x == 0 or 1e-3 <= x < 1e3,
             "must be 0 (greedy) or lie between 0.001 and 1000"),
            ("seed", lambda x: 0 <= x < 2**63, "must lie between 0 and 2^63 - 1"),
            ("save_every", lambda x: x >= 0, "must not be negative"),
            ("prompt instruction", lambda x: not x or is_text(x), "is blank or not valid UTF-8")):
        for name in names.split():
            value = getattr(args, name, None)
            if value is not None and not fits(value):
                raise InputError(f"--{name.replace('_', '-')} {rule} (now {value!r})")


def user_turn(question: str, instruction: str = "", suffix: str = "") -> list[dict]:
    """The chat messages that ask a question; empty parts add nothing."""
    text = "\n".join(part for part in (question, instruction) if part)
    return [{"role": "user", "content": " ".join(part for part in (text, suffix) if part)}]


def prompt_ids(tokenizer, question: str, instruction: str = "", suffix: str = "") -> list[int]:
    """Token ids of the model's own chat prompt, up to where the assistant begins to speak.

    The one place where prompts are made: sampling, training and evaluation all come here.
    The template writes BOS itself where a model has one, so the tokenizer must not add another.
    """
    messages, template = user_turn(question, instruction, suffix), tokenizer.get_chat_template()
    if "strftime_now" in template:  # Llama 3.2 writes today's date: tomorrow's prompts must agree
        template = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n" + template
    return tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False,
                                         add_generation_prompt=True)


def end_of_turn(tokenizer) -> int:
    """The id with which the chat template closes an assistant turn (Llama 3: <|eot_id|>).

    It need not be tokenizer.eos_token nor the first of generation_config.eos_token_id.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    tail = tokenizer(text.rsplit("ANSWER", 1)[1], add_special_tokens=False).input_ids
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((i for i in tail if i in special), tokenizer.eos_token_id)


def stop_ids(model, tokenizer) -> set[int]:
    """All ids that end a response: the end of turn, and every EOS that the model declares."""
    declared = np.ravel(model.generation_config.eos_token_id).tolist()  # one, several or [None]
    return {end_of_turn(tokenizer), tokenizer.eos_token_id, *declared} - {None}


# ---- the KV cache ----------------------------------------------------------------------------


class KVLayer(DynamicLayer):
    """Keys and values of one layer in buffers (rows, heads, columns, head_dim) written in place.

    The library's own layer concatenates, which copies the whole cache at every token. Here `decode`
    reserves room for all tokens to come, each is written into the next free column, and rows that
    are done are overwritten by live ones.
    """

    length = 0  # columns in use
    column = None  # in a captured step: the tensor that says where the new column goes

    def update(self, key_states, value_states, *args, **kwargs):
        """The first call keeps the prompts' columns, each later one adds a column (rows, heads, 1,
        head_dim). Returns all columns; in a captured step also those not yet written."""
        if self.keys is None:
            self.keys, self.values, self.length = key_states, value_states, key_states.shape[2]
            return key_states, value_states
        if self.column is not None:
            return (self.keys.index_copy_(2, self.column, key_states),
                    self.values.index_copy_(2, self.column, value_states))
        self.keys[:, :, self.length] = key_states[:, :, 0]
        self.values[:, :, self.length] = value_states[:, :, 0]
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self):
        """Columns in use; the library reads it to build the attention mask."""
        return self.length

    def lay_out(self, pieces, source: torch.Tensor, width: int, new: int) -> None:
        """Take the rows of layers that were read apart, one under the other, all ending in column
        `width`; then row i becomes a copy of row source[i], for samples of one prompt continue from
        one prefill. `new` columns for the tokens to come are zero: a captured step reads and masks
        them."""
        pad = lambda states, x: F.pad(states, (0, 0, width - x.length, new))
        self.keys = torch.cat([pad(x.keys, x) for x in pieces])[source]
        self.values = torch.cat([pad(x.values, x) for x in pieces])[source]
        self.length = width


def next_logits(model, ids, mask, position, cache) -> torch.Tensor:
    """Read ids (B, T) into the cache; returns the logits (B, V) of the token after the last one."""
    # The keyword is past_key_values, and from transformers 5.24 on cache.
    known = inspect.signature(type(model).forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    return model(ids, attention_mask=mask, position_ids=position, logits_to_keep=1,
                 **{name: cache}).logits[:, -1]


def can_be_captured(model) -> bool:
    """Whether CapturedStep works: a dense model with fixed rotary positions on a GPU, where every
    layer looks at all that was read. (A sliding window is refused, even one that is long enough.)
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return (model.device.type == "cuda" and config._attn_implementation == "sdpa"
            and set(getattr(config, "layer_types", None) or []) <= {"full_attention"}
            and not getattr(config, "sliding_window", None)
            and not getattr(config, "alibi", False)
            and rope.get("rope_type") in ("default", "linear", "llama3", "yarn")
            and not any("expert" in name for name in config.to_dict()))


class CapturedStep:
    """next_logits for one new column as a CUDA graph: its hundreds of kernels in one launch.

    A GPU computes a small model's step faster than Python can launch it kernel by kernel. A graph
    replays the same kernels at the same addresses, so nothing may grow: the cache has all its
    columns from the start, a mask hides those to come, and what changes is copied into buffers.
    """

    def __init__(self, model, cache, mask: torch.Tensor):
        """mask: (rows, columns), 1 where a token is real or to come."""
        rows, columns = mask.shape
        self.model, self.cache, self.graph = model, cache, torch.cuda.CUDAGraph()
        self.ids, self.position = mask.new_zeros(rows, 1), mask.new_zeros(rows, 1)
        self.column = mask.new_full((1,), columns - 1)
        # The graph reads these wherever they were when it was made: they have to outlive it.
        self.not_padding = mask[:, None, None].bool()
        self.columns = torch.arange(columns).to(mask.device)
        for layer in cache.layers:  # it returns all its columns from now on, written or not
            layer.length, layer.column = columns, self.column
        # A first call sets up what must not happen while capturing. What it writes into the last
        # column does no harm: the last token of a response is never read.
        self.step()
        with torch.cuda.graph(self.graph):
            self.logits = self.step()

    def step(self) -> torch.Tensor:
        """The logits (rows, V) that follow what the buffers hold."""
        seen = self.not_padding & (self.columns <= self.column)  # (rows, 1, 1, columns)
        # To be added to the scores: from booleans every layer would make this again.
        mask = torch.where(seen, 0.0, -torch.inf).to(self.model.dtype)
        return next_logits(self.model, self.ids, mask, self.position, self.cache)

    def __call__(self, tokens, position, column: int) -> torch.Tensor:
        """Read tokens (rows,) at `position` (rows,) into the cache's `column`.

        Returns the logits (rows, V): one buffer, which the next call overwrites.
        """
        self.ids.copy_(tokens[:, None])
        self.position.copy_(position[:, None])
        self.column.fill_(column)
        self.graph.replay()
        return self.logits


# ---- sampling --------------------------------------------------------------------------------


def can_be_packed(model) -> bool:
    """Whether packed_weights pays: on a CPU with oneDNN's kernels for this dtype, for models that
    are not tiny, nor so large (4 GB) that a copy of the weights might not fit.
    """
    return (model.device.type == "cpu" and torch.backends.mkldnn.is_available()
            and (model.dtype == torch.float32 or model.dtype == torch.bfloat16
                 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
            and 5e7 < sum(p.nbytes for p in model.parameters()) < 4e9)


@contextmanager
def packed_weights(model):
    """While it lasts, a CPU multiplies by copies of the weights that lie in the order it reads in.

    Otherwise every call puts its weight into that order anew, which with the 64 rows of a decoding
    step takes a fifth (bfloat16) to a third (float32) of the time. Products are the same up to
    rounding, in bfloat16 nearly all bit for bit. The copies, as large as the weights, go at the
    end, because training changes those.
    """
    layers = [m for m in model.modules() if type(m) is Linear and "forward" not in vars(m)]
    try:
        for layer in layers if can_be_packed(model) else ():
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 64)
            layer.forward = lambda hidden, weight=packed, bias=layer.bias: (
                torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], ""))
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # the class's own is back


def pick(logits: torch.Tensor, uniforms, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    """One token id for each row of logits (B, V): argmax at temperature 0, else inverse CDF.

    uniforms: (B,) float64 in [0, 1). Row b gets the first token whose cumulative probability
    exceeds uniforms[b]. In two lines that would be
        upto = softmax(logits / temperature).double().cumsum(-1)
        return (upto <= uniforms[:, None] * upto[:, -1:]).sum(-1)
    but a CPU is slow at a running sum (or an argmax) over a whole vocabulary. So both search among
    sqrt(V) blocks of it, then in one block. Running sums are float64, over blocks and in a block;
    a block's own sum is float32, good to 1e-7 as the softmax itself.
    """
    rows, size = logits.shape
    width, row = int(size**0.5) + 1, torch.arange(rows, device=logits.device)
    blocks = F.pad(logits, (0, width * width - size), value=-torch.inf).view(rows, width, width)
    if temperature == 0:  # the first of the largest, as argmax has it
        block = blocks.amax(-1).argmax(-1)
        return block * width + blocks[row, block].argmax(-1)
    # exp((logit - largest) / T): probabilities but for a constant factor, which `target` shares.
    # In place, because new tensors of this size cost a CPU more than the arithmetic.
    blocks = blocks.float()
    blocks.sub_(blocks.amax((1, 2), keepdim=True)).div_(temperature).exp_()
    if top_p < 1:
        ordered, order = blocks.view(rows, -1).sort(-1, descending=True)
        upto = ordered.double().cumsum(-1)
        outside = upto - ordered >= top_p * upto[:, -1:]  # the first token always stays
        kept = ordered.masked_fill(outside, 0)
        blocks = torch.zeros_like(kept).scatter(-1, order, kept).view_as(blocks)
    sums = blocks.sum(-1).double().cumsum(-1)  # (B, width): up to the end of each block
    target = uniforms[:, None].to(sums) * sums[:, -1:]  # below the last sum: 1 - 2^-53 is enough
    block = (sums <= target).sum(-1)
    chosen, before = blocks[row, block], F.pad(sums, (1, 0))[row, block]
    inside = before[:, None] + chosen.double().cumsum(-1)  # (B, width): up to each of its tokens
    token = (inside <= target).sum(-1)
    # Rounding may leave the target beyond the block's last sum: stay on its last possible token.
    last = torch.where(chosen > 0, torch.arange(width, device=logits.device), 0).amax(-1)
    return block * width + torch.minimum(token, last)


def uniform_stream(seed: int, key: int, sample: int, count: int) -> np.ndarray:
    """(count,) float64 uniforms that belong to this sequence alone, whatever batch it is in."""
    philox = np.random.Philox(key=np.array([seed % 2**64, key << 32 | sample], dtype=np.uint64))
    return np.random.Generator(philox).random(count)


def left_pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists -> ids (B, T) and mask (B, T), 1 where a token is real.

    [[5, 6, 7], [8]] -> ids [[5, 6, 7], [0, 0, 8]], mask [[1, 1, 1], [0, 0, 1]]. The last column
    is every row's last token. Padding is known by the mask: 0 may be a token of its own.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def prefill(model, prompts, source: torch.Tensor, width: int, new: int):
    """Read B prompts, each once; returns the next logits (S, V) of S sequences, and their cache.

    Sequence s continues prompt source[s]. In the cache all prompts end in column `width`, and `new`
    columns follow. Prompts are read a few at a time: on a CPU the work then stays in its caches
    (1.4 times as fast as 64 at once with a model of 135M), on a GPU there is less padding.
    """
    limit = PREFILL_TOKENS[model.device.type]
    logits, caches, at = [], [], 0
    while at < len(prompts):
        rows = prompts[at : at + max(1, limit // len(prompts[at]))]
        ids, own = (x.to(model.device) for x in left_pad(rows))
        caches.append(Cache(layer_class_to_replicate=KVLayer))
        position = (own.cumsum(-1) - 1).clamp(min=0)
        logits.append(next_logits(model, ids, own, position, caches[-1]))
        at += len(rows)
    if not caches[0].layers:
        raise InputError(f"{type(model).__name__} keeps no keys and values")
    for pieces in zip(*(cache.layers for cache in caches)):
        pieces[0].lay_out(pieces, source, width, new)
    return torch.cat(logits)[source], caches[0]


def leave(finished: set[int], rows: int, cache, state) -> list[torch.Tensor]:
    """Take the finished rows out of the cache and of each tensor in `state`, so that `rows` stay.

    Live rows from the end take their places: of A b C D e, with b and e finished, A D C is left.
    """
    holes = [row for row in sorted(finished) if row < rows]
    fillers = sorted(set(range(rows, len(state[0]))) - finished)

    def shorten(tensor):
        """In place: to copy all rows that stay would take longer."""
        tensor[holes] = tensor[fillers]
        return tensor[:rows]

    for layer in cache.layers:
        layer.keys, layer.values = shorten(layer.keys), shorten(layer.values)
    return [shorten(tensor) for tensor in state]


@torch.inference_mode()
def decode(model, prompts, counts, uniforms, *, max_new_tokens, temperature, top_p, eos_ids):
    """The KV-cache loop: one batch, one token a step. Yields [(sequence, token id), ...] per step.

    prompts: B token lists, counts: how many samples of each, so that sequence s is the s-th of
    sum(counts) in that order; uniforms: (sum(counts), max_new_tokens) float64. A sequence that
    has drawn one of eos_ids leaves the batch: a live one takes its row, at once or, with a CUDA
    graph, when half of the rows are done.
    """
    source = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(model.device)
    # Where no row is padded there is nothing to mask, and then the library chooses a kernel
    # (enable_gqa) that takes a CPU up to seven times as long: so there is a masked column.
    pad = int(model.device.type == "cpu")
    mask = F.pad(left_pad(prompts)[1].to(model.device)[source], (pad, 0))
    position, width = mask.sum(-1), mask.shape[1]  # position (rows,): of the next token
    logits, cache = prefill(model, prompts, source, width, max_new_tokens)
    mask = F.pad(mask, (0, max_new_tokens), value=1)
    alive = torch.arange(len(source))  # the sequence that each row of the batch belongs to
    uniforms = torch.tensor(uniforms, device=model.device)
    # Making a graph takes as long as two steps without one.
    use_graph = max_new_tokens > 4 and can_be_captured(model)
    # finished: rows of the batch that are done; kept over several steps with a graph only.
    graph_step, finished = None, set()
    for step in range(max_new_tokens):
        tokens = pick(logits, uniforms[:, step], temperature, top_p)  # (rows,)
        drawn = list(zip(alive.tolist(), tokens.tolist()))
        yield [pair for row, pair in enumerate(drawn) if row not in finished]
        finished.update(row for row, (_, token) in enumerate(drawn) if token in eos_ids)
        rows = len(alive) - len(finished)
        if rows == 0 or step + 1 == max_new_tokens:
            return
        # A graph has to be made again for fewer rows, so there the batch waits to be half empty.
        if finished and (not use_graph or 2 * rows <= len(alive)):
            state = mask, position, tokens, uniforms, alive
            mask, position, tokens, uniforms, alive = leave(finished, rows, cache, state)
            graph_step, finished = None, set()
        if use_graph:
            graph_step = graph_step or CapturedStep(model, cache, mask)
            logits = graph_step(tokens, position, width + step)
        else:
            seen = mask[:, : width + step + 1]
            logits = next_logits(model, tokens[:, None], seen, position[:, None], cache)
        position = position + 1


def peak_memory(device, reset: bool = False) -> float:
    """GiB: the most that tensors took on a GPU since the last reset, or this process on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return peak
    if sys.platform == "win32":
        return float("nan")
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def speed(tokens: int, started: float, device) -> str:
    """What a progress bar says beside its count."""
    rate = tokens / (time.perf_counter() - started)
    return f"{rate:,.0f} tok/s, {peak_memory(device):.1f} GiB"


def out_of_memory(error: Exception) -> bool:
    """Whether this error says that a batch was too large for the memory of the device."""
    texts = "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED"
    return any(text in str(error) for text in texts)


def generate(model, prompts, *, max_new_tokens, temperature=0.0, top_p=1.0, n=1, eos_ids=(),
             seed=0, keys=None, token_budget=None, on_done=lambda *_: None, progress=None):
    """Sample n responses to each prompt; returns per prompt a list of n lists of new token ids.

    prompts: token-id lists. A response ends with the first of eos_ids that was drawn (it is in
    the list) or after max_new_tokens. temperature 0 is greedy. Works on any causal language model
    of transformers whose layers only keep keys and values. InputError if one exceeds the context.

    Sequence (question, sample) draws from its own uniforms, made from (seed, keys[question],
    sample); keys are the prompts' numbers 0, 1, ... unless given. So in float32 the same seed
    gives the same samples whatever the batch size (but for a tie within rounding). In bfloat16 the
    rounding of a matrix product depends on the batch's shape, and changes a few per cent of them.

    Batches are sorted by length and hold at most token_budget columns x rows with every response
    at full length; out of memory halves it and the unfinished go again. on_done(key of the
    prompt, sample, ids) is called as each sequence ends. progress: a label for a bar, or None.
    """
    check_length(model, prompts, max_new_tokens)
    keys = range(len(prompts)) if keys is None else keys
    budget = token_budget or TOKEN_BUDGET
    results = [[[] for _ in range(n)] for _ in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    jobs = [(i, j) for i in longest_first for j in range(n) if max_new_tokens > 0]
    new_tokens, started = 0, time.perf_counter()
    # disable=None: shown on a terminal only
    with packed_weights(model), tqdm(total=len(prompts) * n, desc=progress, unit="seq",
                                     disable=not progress or None) as bar:
        while jobs:
            longest = len(prompts[jobs[0][0]]) + max_new_tokens
            size = max(1, budget // longest)
            batch, rest = jobs[:size], jobs[size:]
            counts = Counter(i for i, _ in batch)  # in order: decode's sequence s is batch[s]
            drawn = [[] for _ in batch]
            streams = [uniform_stream(seed, keys[i], j, max_new_tokens) for i, j in batch]
            try:
                for pairs in decode(model, [prompts[i] for i in counts], list(counts.values()),
                                    np.stack(streams), max_new_tokens=max_new_tokens,
                                    temperature=temperature, top_p=top_p, eos_ids=eos_ids):
                    for s, token in pairs:
                        drawn[s].append(token)
                        if token in eos_ids or len(drawn[s]) == max_new_tokens:
                            i, j = batch[s]
                            results[i][j] = drawn[s]
                            on_done(keys[i], j, drawn[s])
                            bar.update()
                    new_tokens += len(pairs)
                    if not bar.disable:  # a GPU takes long to say its memory
                        bar.set_postfix_str(speed(new_tokens, started, model.device), False)
            except RuntimeError as error:
                if not out_of_memory(error) or budget <= longest:
                    raise
                budget = max(longest, min(budget, len(batch) * longest) // 2)
                print(f"out of memory: going on with --token-budget {budget}", file=sys.stderr)
            jobs = [(i, j) for i, j in batch if not results[i][j]] + rest
    return results


def identity(model) -> dict:
    """What tells models apart, for under one name other weights may lie by now: every 1,000th."""
    some = torch.cat([p.detach().flatten()[::1000].float() for p in model.parameters()]).cpu()
    return {"dtype": str(model.dtype),
            "set of weights": hashlib.sha256(some.numpy()).hexdigest()[:16]}


def generate_to(part, settings: dict, model, prompts, keys, *, n=1, **options) -> dict:
    """generate(), kept in a file as it goes; returns {(key, sample): ids} of all that is in it.

    keys: the numbers of the prompts to sample from. Every sequence is appended to the file `part`
    as it ends, and prompts of which a stopped run left all samples there are not asked again.
    InputError if that run had other `settings`, prompts or weights, of which the first line tells.
    part = None keeps nothing.
    """
    check_length(model, prompts, options["max_new_tokens"])
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    settings = settings | identity(model) | {"set of prompts": digest}
    rows = read_jsonl(part, torn_ok=True) if part and os.path.exists(part) else []
    for name, value in settings.items() if rows else ():
        if rows[0].get(name) != value:
            raise InputError(f"{part} is of a run with another {name} ({rows[0].get(name)!r}, now "
                             f"{value!r}): delete it or choose another output file")
    drawn = {(row["key"], row["sample"]): row["ids"] for row in rows[1:]}
    todo = [key for key in keys if any((key, j) not in drawn for j in range(n))]
    if part:
        write_jsonl(part, rows or [settings])  # again, without a last line that was torn
    with open(part or os.devnull, "a", encoding="utf-8") as file:

        def keep(key, j, ids):
            """Append a sequence. (Of a prompt that was half done, some are there twice.)"""
            drawn[key, j] = ids
            print(json.dumps({"key": key, "sample": j, "ids": ids}), file=file, flush=True)

        if todo:  # no empty bar
            generate(model, [prompts[k] for k in todo], n=n, keys=todo, on_done=keep, **options)
    return drawn


def ask(out, model, tokenizer, questions, instruction, progress, token_budget, **options):
    """Whole responses to questions, kept in `out`.part as they come (None: nowhere).

    Returns ({(question number, sample): ids}, stop ids). options: as generate() takes them.
    """
    prompts = [prompt_ids(tokenizer, q["question"], instruction) for q in questions]
    stops = stop_ids(model, tokenizer)
    drawn = generate_to(out and f"{out}.part", options, model, prompts, range(len(prompts)),
                        eos_ids=stops, token_budget=token_budget, progress=progress, **options)
    return drawn, stops


def check_length(model, prompts, max_new_tokens: int) -> None:
    """InputError where the longest prompt with its response does not fit the model's context."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # Phi-3: a batch beyond this has other frequencies
        context = rope["original_max_position_embeddings"]
    number, longest = max(enumerate(prompts, 1), key=lambda p: len(p[1]), default=(0, []))
    if context and len(longest) + max_new_tokens > context:
        raise InputError(f"prompt {number} has {len(longest)} tokens, and with {max_new_tokens} "
                         f"new ones it exceeds the model's context of {context}: shorten it or "
                         "lower --max-new-tokens (or upft.py's --prefix)")


# ---- script ----------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show every flag's default, once; the help text names those that depend on the model."""

    def _get_help_string(self, action):
        told = action.default is None or "(default" in action.help
        return action.help if told else super()._get_help_string(action)


def model_parser(doc: str, split=None) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts share: which model, where, and what it is asked.

    With split, the file of a set that is asked, also those of sample.py and evaluate.py alone.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=Help)
    flag = parser.add_argument_group("model and questions").add_argument
    flag("--model", default="tiny", help="tiny, a folder or a hub name")
    flag("--data", help="tiny, a prepared set or a JSONL file (upft.py's default: tiny for tiny)")
    flag("--limit", type=int, help="only the first questions")
    flag("--seed", type=int, default=0, help="same seed, same samples")
    flag("--instruction", help="text added to every question (default: none for the embedded "
         f"model, else '{INSTRUCTION}')")
    flag("--max-new-tokens", type=int,
         help="limit of a whole response (default: 160 for tiny, else 512)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    flag("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
         help="arithmetic; auto is bfloat16 where the processor is fast at it")
    flag("--token-budget", type=int, default=TOKEN_BUDGET,
         help="most tokens in one sampling batch; lower it if memory is short")
    if split:
        flag("--split", default=split, help="of a --data name: train, dev or test")
        flag("--n", type=int, default=1, help="samples per question")
        flag("--out", type=user_path, help="file for what --data samples (JSONL)")
        flag("--temperature", type=float, help="0 is greedy (default: 0; 0.6 if n > 1)")
        flag("--top-p", type=float, default=1.0, help="mass of the tokens that stay")
    return parser


def sample_file(model, tokenizer, questions, args, options: dict) -> None:
    """Write n responses to each question of --data, one JSON object a line, in question order."""
    drawn, stops = ask(args.out, model, tokenizer, questions, args.instruction, "sample",
                       args.token_budget, n=args.n, seed=args.seed, **options)
    write_jsonl(args.out, (
        sample_row(tokenizer, questions[i], args.instruction, ids, stops) | {"sample": j}
        for (i, j), ids in sorted(drawn.items())))
    Path(f"{args.out}.part").unlink()
    print(f"{len(questions)} questions x {args.n} samples -> {args.out}")


def sample_row(tokenizer, question, instruction, response, stops, kind="full", suffix="") -> dict:
    """One line of samples.jsonl: ids to train on, and the chat messages that TRL reads.

    A response of kind "prefix" is cut in mid-sentence: its text need not tokenise back to the same
    ids (a cut may fall inside what a tokenizer would join), so the ids are what counts.
    """
    text = tokenizer.decode(response, skip_special_tokens=True)
    return {key: question[key] for key in ("question", "answer") if key in question} | {
        "prompt": user_turn(question["question"], instruction, suffix),
        "completion": [{"role": "assistant", "content": text}],
        "prompt_ids": prompt_ids(tokenizer, question["question"], instruction, suffix),
        "response_ids": response, "kind": kind,
        "finished": bool(response) and response[-1] in stops}


def main(argv=None):
    """Parse the flags; answer one prompt, or write samples for a file of questions."""
    parser = model_parser(__doc__, split="train")
    parser.add_argument("--prompt", help="ask this and print the answer as it comes")
    args = parser.parse_args(argv)
    given = [bool(x) for x in (args.prompt, args.data, args.out)]
    if given not in ([True, False, False], [False, True, True]):
        raise InputError('give --prompt "...", or --data NAME|FILE with --out samples.jsonl')
    if args.out and Path(args.out).exists():
        raise InputError(f"{args.out} exists already: delete it or choose another --out")
    fill_defaults(args)
    # A bad file is told before a model is loaded.
    questions = args.data and load_questions(args.data, args.split, args.limit)
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    options = {name: getattr(args, name) for name in ("temperature", "top_p", "max_new_tokens")}
    if args.data:
        return sample_file(model, tokenizer, questions, args, options)
    prompt = prompt_ids(tokenizer, args.prompt, args.instruction)
    check_length(model, [prompt], args.max_new_tokens)
    stops, streamer = stop_ids(model, tokenizer), TextStreamer(tokenizer, skip_special_tokens=True)
    with packed_weights(model):
        for j in range(args.n):
            uniforms = uniform_stream(args.seed, 0, j, args.max_new_tokens)[None]
            for [(_, token)] in decode(model, [prompt], [1], uniforms, eos_ids=stops, **options):
                if token not in stops:
                    streamer.put(torch.tensor([token]))
            streamer.end()


if __name__ == "__main__":
    run(main)
