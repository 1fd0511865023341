"""Unsupervised Prefix Fine-Tuning (arXiv 2503.02875): train a model on its own first few tokens.

    python upft.py --prefix 8    # the embedded model, about a minute
    python upft.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct --data gsm8k --prefix 8

The method, top to bottom: `collect` samples one response per question, and decodes only its first
t tokens; `make_examples` joins prompt and response; `train` is the loop; `main` does it all and
compares the model before and after. UPFT trains without labels; only the comparison reads them
(and RFT and --label-filter, which are there to be compared with).
"""

import argparse
import json
import math
import os
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage, rmtree, which

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import evaluate
import sample
from sample import InputError, load_questions, model_parser, read_jsonl, write_jsonl

# Section 3.3: closes the user turn of a prefix example, in training only. It lets the model keep
# apart "begin a solution" from "solve it", so that short targets do not teach short answers.
SUFFIX = ("Please provide the initial step towards resolving the question. This step may serve as "
          "a foundation but might not encompass the entire solution.")
# What suits the embedded model, chosen on development questions; and the paper's values (Table 3;
# the batch is its code's).
TINY_DEFAULTS = dict(lr=1e-5, batch_size=16, checkpointing=False, data="tiny", eval_data="tiny")
PAPER_DEFAULTS = dict(lr=1e-6, batch_size=64, checkpointing=True)


# ---- 1. sampling -----------------------------------------------------------------------------


def choose_kinds(count: int, structure: float, seed: int) -> list[str]:
    """Per question: "full" for a random share `structure` of them, else "prefix" (section 3.3)."""
    # [1, seed] here and [2, seed, epoch] in `batches`: NumPy pads seeds with zeros, so seed and
    # [seed, 0] would be ONE stream, and the first batches would hold all the full traces.
    full = set(np.random.default_rng([1, seed]).permutation(count)[: round(structure * count)])
    return ["full" if i in full else "prefix" for i in range(count)]


def collect(model, tokenizer, questions, args, folder: Path) -> tuple[list[dict], dict]:
    """Sample the training responses; returns the rows of samples.jsonl and what they cost.

    UPFT: one sample per question, --prefix tokens of it, or all of it for the share --structure.
    SFT (--structure is then 1): one full sample. RFT and --label-filter: --samples full ones, of
    which the first that evaluate.grade calls correct is kept; questions without one are dropped.
    Finished samples are appended to samples.jsonl.part, from where a stopped run goes on.
    """
    kinds = choose_kinds(len(questions), args.structure, args.seed)
    n = args.samples if args.label_filter else 1
    stops = sample.stop_ids(model, tokenizer)
    prompts = [sample.prompt_ids(tokenizer, q["question"], args.instruction) for q in questions]
    part, started = folder / "samples.jsonl.part", time.perf_counter()
    for kind, limit in (("prefix", args.prefix), ("full", args.max_new_tokens)):
        # With a filter all are whole: whether an answer is right shows only at its end.
        keys = [i for i, k in enumerate(kinds) if kind == ("full" if args.label_filter else k)]
        # It returns all that the file holds: after the second pass, both kinds. (Their settings
        # are those of the run, which --resume compares.)
        drawn = sample.generate_to(
            part, {}, model, prompts, keys, n=n, max_new_tokens=limit, eos_ids=stops,
            temperature=args.temperature, seed=args.seed, token_budget=args.token_budget,
            progress=f"sample {kind}")
    rows, tokens = [], sum(map(len, drawn.values()))
    cost = {"sampled_tokens": tokens} | stage_cost("sampling", started, tokens, model, args)
    for i, question in enumerate(questions):
        for j in range(n):  # the first that is right; without a filter, the only one
            text = tokenizer.decode(drawn[i, j], skip_special_tokens=True)
            if not args.label_filter or evaluate.grade(text, question["answer"])["correct"]:
                rows.append(training_row(tokenizer, question, drawn[i, j], kinds[i], stops, args))
                break
    return rows, cost


def training_row(tokenizer, question, response, kind, stops, args) -> dict:
    """A row of samples.jsonl; a prefix is cut to --prefix tokens, and its prompt ends in SUFFIX."""
    prefix = kind == "prefix"
    ids = response[: args.prefix] if prefix else response
    suffix = SUFFIX if prefix and args.template else ""
    return sample.sample_row(tokenizer, question, args.instruction, ids, stops, kind, suffix)


def completion_text(row: dict) -> str | None:
    """The text of a line's completion, be it text or chat messages; None if it is neither."""
    match row.get("completion"):
        case str(text) | [*_, {"content": str(text)}] if sample.is_text(text):
            return text


def check_sample(row: dict) -> str | None:
    """What is wrong with a line of --samples-from, or None."""
    ids = row.get("response_ids")
    usable = completion_text(row) if ids is None else (
        isinstance(ids, list) and ids and all(isinstance(i, int) and i >= 0 for i in ids))
    if not sample.is_text(row.get("question")) or not usable:
        return 'needs "question", and "completion" or "response_ids"'
    if row.get("kind", "full") not in ("prefix", "full"):
        return f'"kind" is {row["kind"]!r}, not "prefix" or "full"'
    if not isinstance(row.get("finished", True), bool):
        return f'"finished" is {row["finished"]!r}, not true or false'


def read_samples(model, tokenizer, args) -> list[dict]:
    """Rows of samples.jsonl from --samples-from: this script's own, or responses made elsewhere.

    A line holds "question" and "response_ids", or "completion" (text, or messages as TRL has
    them). Without "kind" it is a whole response, which is cut to --prefix tokens but for the share
    --structure; a "prefix" is cut as well, and "full" stays. The ids of a text end the turn, unless
    it says "finished": false or is a "prefix" that does not say true; to given ids none is added.
    """
    rows = read_jsonl(args.samples_from, check=check_sample)[: args.limit]
    end, stops, made = sample.end_of_turn(tokenizer), sample.stop_ids(model, tokenizer), []
    for row, kind in zip(rows, choose_kinds(len(rows), args.structure, args.seed)):
        ids, kind = row.get("response_ids"), row.get("kind", kind)
        if not ids:
            ids = tokenizer(completion_text(row), add_special_tokens=False).input_ids
            if ids[-1:] != [end] and row.get("finished", row.get("kind") != "prefix"):
                ids.append(end)
        made.append(training_row(tokenizer, row, ids, kind, stops, args))
        asked = made[-1]["prompt_ids"]
        if (row.get("prompt_ids", asked) != asked or max(ids, default=0) >= len(tokenizer)
                or kind == "prefix" and args.method != "upft"):
            raise InputError(f"{args.samples_from}: its ids or kinds are not those that "
                             "this model, --method, --instruction and --template give")
    return made


# ---- 2. examples -----------------------------------------------------------------------------


def make_examples(rows: list[dict], end: int, add_eos: bool) -> list[dict]:
    """Rows of samples.jsonl -> examples {"prompt", "response", "kind"} of token ids.

    The response is what was sampled, cut or not, and ids are never re-made from text. With
    add_eos a prefix is closed with the end-of-turn id, unless it ends by itself. A full trace
    ends with the EOS that it drew; one that ran into the length limit has none and gets none.
    """
    closing = lambda row: [end] * (add_eos and row["kind"] == "prefix" and not row["finished"])
    return [{"prompt": row["prompt_ids"], "response": row["response_ids"] + closing(row),
             "kind": row["kind"]} for row in rows]


def length(example: dict) -> int:
    """Tokens that go through the model: the prompt has to be read, too."""
    return len(example["prompt"]) + len(example["response"])


def batches(count: int, batch_size: int, epochs: int, seed: int) -> list[np.ndarray]:
    """The example numbers of every step of the whole run, known before it begins.

    A resumed run takes up this same list at its step; it never reshuffles what remains.
    """
    orders = (np.random.default_rng([2, seed, epoch]).permutation(count) for epoch in range(epochs))
    return [o[at : at + batch_size] for o in orders for at in range(0, count, batch_size)]


def micro_batches(examples: list[dict], size: int) -> list[list[dict]]:
    """Cut one batch into pieces of at most `size` examples that go through the model together.

    A piece is all prefixes or all full traces, of similar length: mixed, the short ones would be
    padded to the length of the long ones, and padding costs as much as text.
    """
    groups = (sorted((e for e in examples if e["kind"] == kind), key=length)
              for kind in ("prefix", "full"))
    return [group[at : at + size] for group in groups for at in range(0, len(group), size)]


# ---- 3. training -----------------------------------------------------------------------------


def head_nll(model, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (N,) in float32 of targets (N,) from last hidden states (N, H)."""
    logits = model.get_output_embeddings()(hidden).float()  # (N, V)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return cross_entropy(logits, targets, reduction="none")


def response_nll(model, examples: list[dict], chunk: int = 1024) -> torch.Tensor:
    """NLL (N,) of every response token of a micro-batch: example by example, in token order.

    Rows are padded on the right, where a causal model never looks: there is nothing to mask, which
    is simpler than the left padding that decoding needs. Only the hidden states that predict a
    response token meet the vocabulary: 8 where the prompt has 100. Long traces meet it `chunk`
    positions at a time, each recomputed in the backward pass, so that their logits never exist all
    at once.
    """
    def pad(rows):
        """Lists of unequal length -> (B, T), with zeros on the right."""
        return pad_sequence(list(map(torch.tensor, rows)), batch_first=True).to(model.device)

    ids = pad([e["prompt"] + e["response"] for e in examples])
    is_response = pad([[False] * len(e["prompt"]) + [True] * len(e["response"]) for e in examples])
    hidden = model.base_model(ids, use_cache=False).last_hidden_state  # (B, T, H)
    # Column k predicts column k + 1: N hidden states (H,) and N targets, in pieces of `chunk`.
    states = hidden[:, :-1][is_response[:, 1:]].split(chunk)
    targets = ids[is_response].split(chunk)
    if len(states) == 1:
        return head_nll(model, states[0], targets[0])
    return torch.cat([checkpoint(head_nll, model, h, t, use_reentrant=False)
                      for h, t in zip(states, targets)])


def token_weights(examples: list[dict], batch: list[dict], weighting: str) -> torch.Tensor:
    """Weight (N,) of every response token of `examples`, a micro-batch of `batch`.

    "example": 1 / (tokens of its example x examples of the batch), so that each example weighs
    the same, as with the paper's micro-batch of one. "token": 1 / tokens of the batch; then 10 %
    of full traces with 300 tokens carry 80 % of the gradient.
    """
    lengths = torch.tensor([len(e["response"]) for e in examples])
    if weighting == "token":
        return torch.full((int(lengths.sum()),), 1 / sum(len(e["response"]) for e in batch))
    return (1 / (lengths * len(batch))).repeat_interleave(lengths)


# Not cuDNN's attention: with a mask its gradient was now and then NaN (torch 2.11 on an H100).
# Whether also without a mask, as here, is not known; the others are as fast.
@sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def backward(model, batch: list[dict], micro_batch: int, weighting: str) -> float:
    """Add the gradient of a batch's loss to the parameters, piece by piece; returns the loss."""
    total = 0.0
    for piece in micro_batches(batch, micro_batch):
        weights = token_weights(piece, batch, weighting).to(model.device)
        loss = (response_nll(model, piece) * weights).sum()
        loss.backward()
        total += loss.item()
    return total


BETAS, EPS = (0.9, 0.95), 1e-8  # of Adam


class SplitAdamW:
    """AdamW for bfloat16 weights that loses no small step: float32 masters, split in two halves.

    A bfloat16 weight has 8 significant bits, and at lr 1e-6 a step is far below half a unit in the
    last of them, so plain bfloat16 AdamW rounds nearly every step away. Here bits of the master =
    (bits of the weight << 16) + lost: the model computes with the weight, and `lost`, int16 with a
    sign, is what rounding it to nearest took away. With gradient and two moments in bfloat16 that
    is 10 bytes a parameter: 71 GiB for 7.6e9; float32 masters beside the weights take 12 or more.
    beta2 has to be below 0.996 or so: a bfloat16 moment cannot follow changes of less than 0.4 %.
    """

    def __init__(self, parameters):
        self.parameters, self.steps = list(parameters), 0
        zeros = lambda dtype: [torch.zeros_like(p, dtype=dtype).view(-1) for p in self.parameters]
        self.lost, self.m, self.v = zeros(torch.int16), zeros(torch.bfloat16), zeros(torch.bfloat16)
        device = self.parameters[0].device.type
        # Elements per call: float32 copies stay in a CPU's caches, and small on a GPU.
        self.update, self.chunk = split_adamw, (1 << 18 if device == "cpu" else 1 << 24)
        header = Path(sysconfig.get_path("include"), "Python.h")  # Triton compiles C code
        if (device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
                and find_spec("triton") and header.exists() and (which("gcc") or which("clang"))):
            # One kernel instead of twenty, and no copies: 7.6e9 weights in 0.05 s, not in 0.54.
            self.update, self.chunk = torch.compile(split_adamw, dynamic=True), 1 << 40

    @staticmethod
    def join(weight: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
        """float32 master from its bfloat16 and int16 halves, exactly."""
        return ((weight.view(torch.int16).int() << 16) + lost).view(torch.float32)

    @staticmethod
    def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(bfloat16 rounded to nearest, the int16 that join() needs to undo it)."""
        bits = master.view(torch.int32)
        upper = (bits + 0x8000) >> 16
        return upper.short().view(torch.bfloat16), (bits - (upper << 16)).short()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of all weights from their .grad, with bias correction, without decay."""
        self.steps += 1
        rates = lr / (1 - BETAS[0] ** self.steps), 1 - BETAS[1] ** self.steps
        # As tensors, because a compiled update would be compiled again for another number.
        rate, correction = (torch.tensor(x, device=self.parameters[0].device) for x in rates)
        for p, *state in zip(self.parameters, self.lost, self.m, self.v):
            if p.grad is None:
                continue
            tensors = (p.view(-1), p.grad.view(-1), *state)
            for part in zip(*(t.split(self.chunk) for t in tensors)):
                self.update(*part, rate, correction)

    def state_dict(self) -> dict:
        """What a resumed run needs beside the weights."""
        return {"tensors": self.lost + self.m + self.v, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Take up where state_dict() was made."""
        for mine, saved in zip(self.lost + self.m + self.v, state["tensors"]):
            mine.copy_(saved)
        self.steps = state["steps"]


def split_adamw(weight, grad, lost, m, v, rate, correction) -> None:
    """Step n of some weights, in place; rate: lr / (1 - beta1^n), correction: 1 - beta2^n."""
    grad = grad.float()
    mean = m.float().lerp_(grad, 1 - BETAS[0])
    square = v.float().lerp_(grad.square_(), 1 - BETAS[1])
    m.copy_(mean)
    v.copy_(square)
    size = square.div_(correction).sqrt_().add_(EPS)
    master = SplitAdamW.join(weight, lost).addcdiv_(mean.mul_(rate), size, value=-1)
    upper, lower = SplitAdamW.split(master)
    weight.copy_(upper)
    lost.copy_(lower)


class Float32AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW (one pass over the weights) for float32 weights, no weight decay."""

    def __init__(self, parameters):
        super().__init__(parameters, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)

    def step(self, lr: float) -> None:
        """One update of all weights from their .grad."""
        self.param_groups[0]["lr"] = lr
        super().step()


def train(model, examples: list[dict], args, folder: Path) -> list[float]:
    """Fine-tune all weights of `model` in place; returns the loss of every step.

    Constant learning rate after a linear warm-up (Table 3); gradient norm clipped at --clip (ours).
    Every --save-every steps a checkpoint makes the run resumable, bit for bit on a CPU.
    """
    plan = batches(len(examples), args.batch_size, args.epochs, args.seed)
    warmup = max(1, math.ceil(args.warmup * len(plan)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = (SplitAdamW if model.dtype == torch.bfloat16 else Float32AdamW)(parameters)
    losses = load_checkpoint(folder, model, optimizer) if args.resume else []
    model.train()
    if args.checkpointing:
        enable_checkpointing(model)
    bar = tqdm(range(len(losses), len(plan)), desc="train", total=len(plan), initial=len(losses),
               unit="step", disable=None)
    done_tokens, started = 0, time.perf_counter()
    for step in bar:
        batch = [examples[i] for i in plan[step]]
        torch.manual_seed(args.seed + step)  # for models with dropout; so a resumed run has it, too
        loss = backward(model, batch, args.micro_batch, args.weighting)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(f"step {step + 1}: loss {loss}, gradient norm {norm}: training "
                             f"diverged. Lower --lr (now {args.lr}) or use --dtype float32; "
                             f"--samples-from {folder}/samples.jsonl saves sampling again")
        # (step + 1): even a run of one step moves the weights.
        optimizer.step(args.lr * min(1, (step + 1) / warmup))
        model.zero_grad()
        losses.append(loss)
        done_tokens += sum(map(length, batch))
        bar.set_postfix_str(
            f"loss {loss:.3f}, {sample.speed(done_tokens, started, model.device)}", False)
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < len(plan):
            save_checkpoint(folder, model, optimizer, losses)
    if not all(p.isfinite().all() for p in parameters):  # by the last update
        raise InputError(f"training diverged in its last step. Lower --lr (now {args.lr})")
    model.eval()
    return losses


def enable_checkpointing(model) -> None:
    """Keep only each layer's input, and recompute the rest in the backward pass.

    It acts in training mode only. The second of the two names is that of versions before 5.24.
    """
    if not model.supports_gradient_checkpointing:
        raise InputError(f"{type(model).__name__} cannot recompute activations: give "
                         "--no-checkpointing, and this run's folder with --out and --resume")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@torch.no_grad()
def check_head(model, ids: list[int]) -> None:
    """InputError if head_nll misses something of this family's head, such as a scale."""
    tensor = torch.tensor([ids], device=model.device)
    own = cross_entropy(model(tensor).logits[0, :-1].float(), tensor[0, 1:], reduction="none")
    ours = response_nll(model, [{"prompt": ids[:1], "response": ids[1:]}])
    if (own - ours).abs().mean() > 0.05 * own.mean() + 0.02:
        raise InputError(f"head_nll in upft.py does not give the logits of {type(model).__name__}")


def save_checkpoint(folder: Path, model, optimizer, losses) -> None:
    """Everything that training needs to go on; replaces the one before only when complete."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    try:
        torch.save(state, folder / "checkpoint.pt.tmp")
    except RuntimeError as error:  # what torch makes of a full disk
        (folder / "checkpoint.pt.tmp").unlink(missing_ok=True)
        raise InputError(f"cannot save a checkpoint ({error}); --save-every 0 makes none") from None
    os.replace(folder / "checkpoint.pt.tmp", folder / "checkpoint.pt")


def load_checkpoint(folder: Path, model, optimizer) -> list[float]:
    """Restore the last checkpoint, if there is one; returns the losses of the steps done."""
    if not (folder / "checkpoint.pt").exists():
        return []
    # Not all 8 bytes a parameter in memory at once. (On a CPU the optimiser would keep the map.)
    state = torch.load(folder / "checkpoint.pt", map_location="cpu",
                       mmap=model.device.type == "cuda")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["losses"]


# ---- 4. the run ------------------------------------------------------------------------------


def parse_arguments(argv=None):
    """The flags, with the values that suit the model where they were not given."""
    parser, yes_no = model_parser(__doc__), argparse.BooleanOptionalAction
    flag = parser.add_argument_group("held-out questions").add_argument
    flag("--eval-data", help="held-out questions with answers (default: tiny for tiny, "
         "the test file of a prepared --data, else no evaluation)")
    flag("--eval-limit", type=int, help="only the first held-out questions")
    flag = parser.add_argument_group("what is sampled and trained on").add_argument
    flag("--method", default="upft", choices=["upft", "sft", "rft"],
         help="prefixes; full traces; full traces filtered by the label")
    flag("--prefix", type=int, default=8, help="t, tokens of a prefix")
    flag("--structure", type=float, default=0.1, help="p, share of full traces")
    flag("--temperature", type=float, default=0.6, help="of the training samples")
    flag("--samples", type=int, default=16, help="per question, for rft or the filter")
    flag("--label-filter", action="store_true", help="UPFT on samples that are right")
    flag("--samples-from", type=sample.user_path,
         help="train on the samples of this JSONL file (prefixes are cut to --prefix)")
    flag("--template", action=yes_no, default=True,
         help="end the user turn of a prefix example with the paper's task template")
    flag("--eos", action=yes_no, default=False, help="end a prefix with an end of turn")
    flag = parser.add_argument_group("training").add_argument
    flag("--lr", type=float, help="learning rate (default: 1e-5 for tiny, else 1e-6)")
    flag("--epochs", type=int, default=1, help="passes over the examples")
    flag("--batch-size", type=int, help="examples a step (default: 16 for tiny, else 64)")
    flag("--micro-batch", type=int, default=16, help="examples in memory at a time")
    flag("--checkpointing", action=yes_no,
         help="recompute activations to save memory (default: not for tiny)")
    flag("--warmup", type=float, default=0.03, help="share of the steps that warm up")
    flag("--clip", type=float, default=1.0, help="largest gradient norm")
    flag("--weighting", default="example", choices=["example", "token"],
         help="what weighs the same in the loss")
    flag = parser.add_argument_group("run").add_argument
    flag("--out", type=sample.user_path, help="the run's folder (default: a new one in out/)")
    flag("--save-every", type=int, default=100, help="steps between checkpoints, or 0")
    flag("--resume", action="store_true", help="go on with the stopped run in --out")
    args = parser.parse_args(argv)
    tiny = sample.is_tiny(args.model)
    defaults = TINY_DEFAULTS if tiny else PAPER_DEFAULTS
    world = Path(sample.user_path(args.model))
    if tiny and (world / "train.jsonl").exists():  # a world of data/make_tiny.py
        defaults = defaults | dict(data=f"{world}/train.jsonl", eval_data=f"{world}/test.jsonl")
    sample.fill_defaults(args, **defaults)
    if args.method != "upft":
        args.structure = 1.0  # SFT and RFT are full traces and nothing else
    args.label_filter |= args.method == "rft"  # RFT: the filter on full traces
    if args.data is None and not args.samples_from:
        raise InputError("--data is needed with --model: a prepared set or a JSONL file")
    if args.label_filter and (args.samples_from or args.method == "sft"):
        raise InputError("--label-filter (or rft) goes neither with --samples-from, whose samples "
                         "are taken as they are, nor with sft: that would be rft")
    prepared = args.data == "tiny" or (sample.DATA / f"{args.data}_test.jsonl").exists()
    if args.eval_data is None and prepared:
        args.eval_data = args.data
    return args


def choose_folder(args) -> Path:
    """The run's folder; InputError if it is in use, or if a resumed run has other settings."""
    name = f"{args.method}-t{args.prefix}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.out or f"out/{name}-{os.getpid()}")
    if args.resume:
        if not (folder / "settings.json").exists():
            raise InputError(f"no run in {folder}: --resume needs --out, a stopped run's folder")
        before = json.loads((folder / "settings.json").read_text())
        # These may change between parts of a run: its result does not, beyond rounding.
        free = "resume out save_every micro_batch token_budget checkpointing device dtype".split()
        changed = [k.replace("_", " ") for k, v in vars(args).items()
                   if k not in free and v != before.get(k)]
        if changed:
            raise InputError(f"--resume: {', '.join(changed)} differ from the run in {folder}")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is in use: give another --out"
                         + ", or --resume it" * (folder / "settings.json").exists())
    return folder


def write_json(path: Path, value) -> None:
    """Write one JSON value, indented; as with write_jsonl, never half a file."""
    write_jsonl(path, [value], indent=1)


def stage_cost(stage: str, started: float, tokens: int, model, args) -> dict:
    """What a stage took. A resumed run sees its last part only, so it has no speed.

    The peak is reset, so that on a GPU that of training is not that of an evaluation.
    """
    seconds = time.perf_counter() - started
    return {f"{stage}_seconds": seconds,
            f"{stage}_tokens_per_second": None if args.resume else tokens / seconds,
            f"{stage}_peak_gib": sample.peak_memory(model.device, reset=True)}


def get_samples(model, tokenizer, questions, given, args, folder: Path, metrics) -> list[dict]:
    """The rows of samples.jsonl: given or sampled now; a resumed run reads those on disk."""
    path, asked = folder / "samples.jsonl", len(given or questions)
    if not path.exists():
        rows, cost = given, {"sampled_tokens": 0, "sampling_seconds": 0.0}
        if not given:
            rows, cost = collect(model, tokenizer, questions, args, folder)
        if not rows:
            raise InputError("no sampled answer was right, so nothing is left to train on")
        metrics |= cost | {"questions": asked, "dropped_questions": asked - len(rows)}
        write_json(folder / "metrics.json", metrics)
        write_jsonl(path, rows)
    (folder / "samples.jsonl.part").unlink(missing_ok=True)
    print(f"sampled {metrics['sampled_tokens']:,} tokens for {metrics['questions']:,} questions in "
          f"{metrics['sampling_seconds']:.1f} s -> {path}")
    return read_jsonl(path)


def get_tuned(model, tokenizer, rows, args, folder: Path, metrics: dict):
    """The fine-tuned model, saved in the run's folder; loaded from there where it exists."""
    if (folder / "model").exists():
        return sample.load_model((folder / "model").resolve(), args.device, args.dtype)[0]
    examples = make_examples(rows, sample.end_of_turn(tokenizer), args.eos)
    rmtree(folder / "model.tmp", ignore_errors=True)  # what a killed run may have left
    (folder / "checkpoint.pt.tmp").unlink(missing_ok=True)
    if disk_usage(folder).free < sum(p.nbytes for p in model.parameters()):
        raise InputError(f"no room on the disk for the tuned model: make some, then --out {folder} "
                         "--resume")
    started = time.perf_counter()
    losses = train(model, examples, args, folder)
    processed = args.epochs * sum(map(length, examples))
    metrics |= stage_cost("training", started, processed, model, args) | {
        "examples": len(examples), "full_examples": sum(e["kind"] == "full" for e in examples),
        "full_cut_off": sum(r["kind"] == "full" and not r["finished"] for r in rows),
        "tuned_tokens": sum(len(e["response"]) for e in examples),  # in one pass over them
        "processed_tokens": processed, "train_loss": losses}
    try:
        model.save_pretrained(folder / "model.tmp")
        tokenizer.save_pretrained(folder / "model.tmp")
    except Exception as error:  # a full disk has a name of its own in safetensors
        raise InputError(f"cannot save the model in {folder}: {error}") from None
    write_json(folder / "metrics.json", metrics)
    os.replace(folder / "model.tmp", folder / "model")
    few = math.ceil(len(losses) / 10)
    print(f"trained {len(losses)} steps on {len(examples):,} examples in "
          f"{metrics['training_seconds']:.1f} s, mean loss of the first {few} steps "
          f"{np.mean(losses[:few]):.3f}, the last {np.mean(losses[-few:]):.3f} -> {folder}/model")
    return model


def measure(name, model, tokenizer, held_out, args, folder: Path, metrics: dict) -> list[dict]:
    """Greedy accuracy on the held-out questions (one completion, as in the paper)."""
    path, started = folder / f"predictions_{name}.jsonl", time.perf_counter()
    options = {k: getattr(args, k) for k in ("max_new_tokens", "instruction", "token_budget")}
    rows = read_jsonl(path) if path.exists() else evaluate.evaluate(
        model, tokenizer, held_out, out=path, label=f"evaluate {name}", **options)
    tokens = sum(row["tokens"] for row in rows)
    # What an earlier part of the run has noted stays.
    metrics |= stage_cost(f"{name}_evaluation", started, tokens, model, args) | metrics
    metrics[name] = evaluate.summarize(rows)
    write_json(folder / "metrics.json", metrics)
    print(f"{name}: {metrics[name]['correct']} of {metrics[name]['n']} right")
    return rows


def verdict(base: dict, tuned: dict, paired: dict) -> str:
    """What the comparison says, in words: beyond noise or not, and whether the model collapsed."""
    text = evaluate.describe(paired)
    better = tuned["accuracy"] > base["accuracy"]
    if not better and tuned["mean_tokens"] < 0.5 * base["mean_tokens"]:
        text += (f"\nCOLLAPSE: answers have shrunk from {base['mean_tokens']:.0f} to "
                 f"{tuned['mean_tokens']:.0f} tokens; the model has learned to stop, not to solve")
    if any(tuned[share] > base[share] + 0.2 for share in ("cut_off", "no_answer")):
        text += "\nCOLLAPSE: many answers are now cut off or hold no answer at all"
    return text


def print_results(metrics: dict) -> None:
    """Print the run in one small table."""
    print()
    evaluate.print_table({name: metrics[name] for name in ("base", "tuned")})
    print(verdict(metrics["base"], metrics["tuned"], metrics["paired"]))
    print("{sampled_tokens:,} sampled tokens, {tuned_tokens:,} tuned tokens in {examples:,} "
          "examples ({full_examples} full traces, {full_cut_off} cut off; {dropped_questions} "
          "questions dropped)\nseconds: sampling {sampling_seconds:.1f}, training "
          "{training_seconds:.1f}, evaluation {base_evaluation_seconds:.1f} + "
          "{tuned_evaluation_seconds:.1f}".format(**metrics)
          + " (a resumed run: of the last part only)" * metrics["resumed"])


def main(argv=None):
    """Sample, train, save, and compare the model before and after."""
    args = parse_arguments(argv)
    questions = [] if args.samples_from else load_questions(
        args.data, "train", args.limit, args.label_filter)
    held_out = args.eval_data and load_questions(args.eval_data, "test", args.eval_limit, True)
    folder = choose_folder(args)
    model, tokenizer = sample.load_model(args.model, args.device, args.dtype)
    check_head(model, sample.prompt_ids(tokenizer, "What is 1 + 1?"))
    suffix = SUFFIX if args.template and args.method == "upft" else ""
    for asked, added, new_tokens in (
            (questions, "", args.max_new_tokens),  # as sampled
            (held_out or [], "", args.max_new_tokens),  # as graded
            (questions, suffix, args.prefix + args.eos)):  # as trained on
        prompts = [sample.prompt_ids(tokenizer, q["question"], args.instruction, added)
                   for q in asked]
        sample.check_length(model, prompts, new_tokens)
    given = read_samples(model, tokenizer, args) if args.samples_from else []
    sample.check_length(model, [row["prompt_ids"] + row["response_ids"] for row in given], 0)
    record = folder / "metrics.json"
    metrics = json.loads(record.read_text()) if record.exists() else {
        k: getattr(args, k) for k in ("method", "prefix", "structure", "seed", "model")}
    args.dtype_and_weights = sample.identity(model)  # goes to settings.json with the flags
    choose_folder(args)  # again: compare that, too; and another run may have begun there by now
    write_json(folder / "settings.json", vars(args))
    print(f"run folder: {folder}", flush=True)
    if "paired" not in metrics:  # the run is not over
        metrics["resumed"] = args.resume
    rows = get_samples(model, tokenizer, questions, given, args, folder, metrics)
    before = held_out and measure("base", model, tokenizer, held_out, args, folder, metrics)
    model = get_tuned(model, tokenizer, rows, args, folder, metrics)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    if not held_out:
        return print("no --eval-data, so nothing was measured")
    after = measure("tuned", model, tokenizer, held_out, args, folder, metrics)
    metrics["paired"] = evaluate.compare(before, after)
    write_json(record, metrics)
    print_results(metrics)


if __name__ == "__main__":
    sample.run(main)
