"""Unsupervised Prefix Fine-Tuning (arXiv 2503.02875): train a model on its own first few tokens.

    python upft.py --prefix 8    # the embedded model, about a minute
    python upft.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k --prefix 8

The method, top to bottom: `collect` samples one response per question, and decodes only its first
t tokens; `make_examples` joins prompt and response; `train` is the loop; `main` does it all and
compares the model before and after. UPFT trains without labels; only the comparison reads them.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import evaluate
import sample
from sample import InputError, read_jsonl, write_jsonl

# Section 3.3: closes the user turn of a prefix example, in training only. It lets the model keep
# apart "begin a solution" from "solve it", so that short targets do not teach short answers.
SUFFIX = (
    "Please provide the initial step towards resolving the question. "
    "This step may serve as a foundation but might not encompass the entire solution."
)
# What suits the embedded model, chosen on development questions; and the paper's Table 3.
TINY_DEFAULTS = dict(lr=1e-5, batch_size=16, checkpointing=False, data="tiny", eval_data="tiny")
PAPER_DEFAULTS = dict(lr=1e-6, batch_size=64, checkpointing=True)


# ---- 1. sampling -----------------------------------------------------------------------------


def choose_kinds(count: int, structure: float, seed: int) -> list[str]:
    """ "full" for a random share `structure` of the questions, "prefix" for the others (3.3)."""
    kinds = ["prefix"] * count
    # [1, seed] here and [2, seed, epoch] in `batches`: NumPy pads seeds with zeros, so seed and
    # [seed, 0] would be ONE stream, and the first batches would hold all the full traces.
    for i in np.random.default_rng([1, seed]).permutation(count)[: round(structure * count)]:
        kinds[i] = "full"
    return kinds


def collect(model, tokenizer, questions, args, folder: Path) -> tuple[list[dict], dict]:
    """Sample the training responses; returns the rows of samples.jsonl and what they cost.

    UPFT: one sample per question, --prefix tokens of it, or all of it for the share --structure.
    SFT: one full sample. RFT and --label-filter: --samples full ones, of which the first that
    evaluate.is_correct accepts is kept, and questions without one are dropped. Finished samples
    are appended to samples.jsonl.part, from where a stopped run goes on.
    """
    kinds = choose_kinds(len(questions), args.structure, args.seed)
    filtered = args.method == "rft" or args.label_filter
    n = args.samples if filtered else 1
    stops = sample.stop_ids(model, tokenizer)
    prompts = [sample.prompt_ids(tokenizer, q["question"], args.instruction) for q in questions]
    started = time.perf_counter()
    limits = [("prefix", args.prefix), ("full", args.max_new_tokens)]
    # Whether an answer is right shows only at its end, so filtered samples are all full ones.
    for kind, limit in limits[filtered:]:
        keys = [i for i in range(len(questions)) if filtered or kinds[i] == kind]
        drawn = sample.generate_to(
            folder / "samples.jsonl.part", {}, model, [prompts[i] for i in keys], keys, n=n,
            max_new_tokens=limit, temperature=args.temperature, eos_ids=stops, seed=args.seed,
            token_budget=args.token_budget, progress=f"sample {kind}",
        )
    seconds = time.perf_counter() - started
    rows, dropped = [], 0
    for i, question in enumerate(questions):
        responses = [drawn[i, j] for j in range(n)]
        if filtered:
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            graded = [evaluate.grade(text, question["answer"])["correct"] for text in texts]
            responses = [ids for ids, right in zip(responses, graded) if right]
        if not responses:
            dropped += 1
            continue
        ids = responses[0][: args.prefix] if kinds[i] == "prefix" else responses[0]
        suffix = SUFFIX if kinds[i] == "prefix" and args.template else ""
        prompt = sample.prompt_ids(tokenizer, question["question"], args.instruction, suffix)
        rows.append(sample.sample_row(
            tokenizer, question, args.instruction, suffix, prompt, ids, kinds[i], stops
        ))
    tokens = sum(map(len, drawn.values()))
    return rows, {
        "sampled_tokens": tokens, "sampling_seconds": seconds,
        "sampling_tokens_per_second": None if args.resume else tokens / seconds,
        "sampling_peak_gib": sample.peak_memory(model.device, reset=True),
        "questions": len(questions), "dropped_questions": dropped,
    }


def check_sample(row: dict) -> str | None:
    """What is wrong with a line of --samples-from, or None."""
    whole = {"prompt_ids", "response_ids", "kind", "finished"} <= set(row)
    if not isinstance(row.get("question"), str) or not (whole or row.get("completion")):
        return 'needs "question" and "completion", or the fields of samples.jsonl'
    if row.get("kind", "full") not in ("prefix", "full"):
        return f'"kind" is {row["kind"]!r}, not "prefix" or "full"'


def read_samples(tokenizer, args) -> list[dict]:
    """Rows of samples.jsonl from --samples-from: this script's own, or responses made elsewhere.

    A line from elsewhere holds "question" and "completion" (text, or messages as TRL has them).
    Without "kind" it is a whole response, which is cut to --prefix tokens but for the share
    --structure; a "prefix" is cut as well, and "full" stays. A whole response ends its turn unless
    it says "finished": false, a "prefix" only if it says true. Lines that hold ids stay unchanged.
    """
    rows = read_jsonl(args.samples_from, check=check_sample)[: args.limit]
    end, made = sample.end_of_turn(tokenizer), []
    for row, drawn in zip(rows, choose_kinds(len(rows), args.structure, args.seed)):
        kind = row.get("kind", drawn)
        suffix = SUFFIX if kind == "prefix" and args.template else ""
        prompt = sample.prompt_ids(tokenizer, row["question"], args.instruction, suffix)
        if "response_ids" not in row:
            text = row["completion"]
            text = text if isinstance(text, str) else text[-1]["content"]
            finished = row.get("finished", row.get("kind") != "prefix")
            ids = tokenizer(text, add_special_tokens=False).input_ids + [end] * finished
            ids = ids[: args.prefix] if kind == "prefix" else ids
            row = sample.sample_row(
                tokenizer, row, args.instruction, suffix, prompt, ids, kind, {end}
            )
        elif row["prompt_ids"] != prompt:
            raise InputError(f"{args.samples_from}: prompt_ids are not those that this model, "
                             "--instruction and --template give")
        made.append(row)
    if not made:
        raise InputError(f"{args.samples_from} holds no samples")
    return made


# ---- 2. examples -----------------------------------------------------------------------------


def make_examples(rows: list[dict], end: int, add_eos: bool) -> list[dict]:
    """Rows of samples.jsonl -> examples {"prompt", "response", "kind"} of token ids.

    The response is what was sampled, cut or not, and ids are never re-made from text. With
    add_eos a prefix is closed with the end-of-turn id, unless it ends by itself. A full trace
    ends with the EOS that it drew; one that ran into the length limit has none and gets none.
    """
    examples = []
    for row in rows:
        closing = [end] if add_eos and row["kind"] == "prefix" and not row["finished"] else []
        examples.append({"prompt": row["prompt_ids"], "response": row["response_ids"] + closing,
                         "kind": row["kind"]})
    return examples


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

    A piece is all prefixes or all full traces, of similar length: mixed, the long traces would
    set how many columns of logits the short ones compute.
    """
    pieces = []
    for kind in ("prefix", "full"):
        group = [e for e in examples if e["kind"] == kind]
        group.sort(key=length)
        pieces += [group[at : at + size] for at in range(0, len(group), size)]
    return pieces


# ---- 3. training -----------------------------------------------------------------------------


def head_nll(model, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (N,) in float32 of targets (N,) from last hidden states (N, H)."""
    logits = model.get_output_embeddings()(hidden).float()  # (N, V)
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def response_nll(model, examples: list[dict], chunk: int = 1024) -> torch.Tensor:
    """NLL (N,) of every response token of a micro-batch: example by example, in token order.

    With left padding all responses end in the last column, so only the last K + 1 columns of the
    hidden states (K = longest response) meet the vocabulary, and of those only real ones: 8
    columns where the prompt has 100. Long traces meet it `chunk` positions at a time, each
    recomputed in the backward pass, so that logits never exist for all positions at once.
    """
    ids, mask = sample.left_pad([e["prompt"] + e["response"] for e in examples])
    ids, mask = ids.to(model.device), mask.to(model.device)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    longest = max(len(e["response"]) for e in examples)
    hidden = model.base_model(
        ids, attention_mask=mask, position_ids=position, use_cache=False
    ).last_hidden_state[:, -longest - 1 : -1]  # (B, K, H): column k predicts column k + 1
    targets = ids[:, -longest:]  # (B, K)
    lengths = torch.tensor([len(e["response"]) for e in examples], device=model.device)
    real = torch.arange(longest, device=model.device) >= longest - lengths[:, None]  # (B, K)
    pieces = list(zip(hidden[real].split(chunk), targets[real].split(chunk)))
    if len(pieces) == 1:
        return head_nll(model, *pieces[0])
    return torch.cat([checkpoint(head_nll, model, h, t, use_reentrant=False) for h, t in pieces])


def token_weights(examples: list[dict], batch: list[dict], weighting: str) -> torch.Tensor:
    """Weight (N,) of every response token of `examples`, a micro-batch of `batch`.

    "example": 1 / (tokens of its example x examples of the batch), so that each example weighs
    the same, as with the paper's micro-batch of one. "token": 1 / tokens of the batch; then 10 %
    of full traces with 300 tokens carry 80 % of the gradient, and it is no longer prefix tuning.
    """
    lengths = torch.tensor([len(e["response"]) for e in examples])
    if weighting == "token":
        total = sum(len(e["response"]) for e in batch)
        return torch.full((int(lengths.sum()),), 1 / total)
    return (1 / (lengths * len(batch))).repeat_interleave(lengths)


def backward(model, batch: list[dict], micro_batch: int, weighting: str) -> float:
    """Add the gradient of a batch's loss to the parameters, piece by piece; returns the loss."""
    total = 0.0
    for piece in micro_batches(batch, micro_batch):
        weights = token_weights(piece, batch, weighting).to(model.device)
        loss = (response_nll(model, piece) * weights).sum()
        loss.backward()
        total += loss.item()
    return total


class SplitAdamW:
    """AdamW for bfloat16 weights that loses nothing: float32 masters, split in two halves.

    At lr 1e-6 a step is far below half a unit in the last place of a bfloat16 weight (8 bits), so
    plain bfloat16 AdamW rounds nearly every step away. Here master = weight (the upper 16 bits,
    rounded, which the model computes with) + lost (the lower 16, int16). With gradient and two
    moments in bfloat16 that is 10 bytes a parameter: 71 GiB for 7.6e9, where float32 masters
    beside bfloat16 weights take 12 or more. beta2 must be 0.95: a bfloat16 second moment cannot
    follow a decay of 0.999.
    """

    CHUNK = {"cuda": 1 << 24, "cpu": 1 << 18}  # elements at a time: float32 copies stay small

    def __init__(self, parameters, betas=(0.9, 0.95), eps=1e-8):
        self.parameters, self.betas, self.eps, self.steps = list(parameters), betas, eps, 0
        zeros = lambda dtype: [torch.zeros_like(p, dtype=dtype).view(-1) for p in self.parameters]
        self.lost, self.m, self.v = zeros(torch.int16), zeros(torch.bfloat16), zeros(torch.bfloat16)

    @staticmethod
    def join(weight: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
        """float32 master from its bfloat16 and int16 halves, exactly."""
        upper = weight.view(torch.int16).int() << 16
        return (upper + lost).view(torch.float32)

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
        (beta1, beta2), size = self.betas, self.CHUNK.get(self.parameters[0].device.type, 1 << 24)
        for p, *state in zip(self.parameters, self.lost, self.m, self.v):
            if p.grad is None:
                continue
            tensors = [t.split(size) for t in (p.view(-1), p.grad.view(-1), *state)]
            for weight, grad, lost, m, v in zip(*tensors):
                grad = grad.float()
                mean = m.float().lerp_(grad, 1 - beta1)
                square = v.float().lerp_(grad.square_(), 1 - beta2)
                m.copy_(mean)
                v.copy_(square)
                square.div_(1 - beta2**self.steps).sqrt_().add_(self.eps)
                master = self.join(weight, lost).addcdiv_(
                    mean, square, value=-lr / (1 - beta1**self.steps)
                )
                upper, lower = self.split(master)
                weight.copy_(upper)
                lost.copy_(lower)

    def state_dict(self) -> dict:
        """What a resumed run needs beside the weights."""
        return {"lost": self.lost, "m": self.m, "v": self.v, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Take up where state_dict() was made."""
        for name in ("lost", "m", "v"):
            for mine, saved in zip(getattr(self, name), state[name]):
                mine.copy_(saved)
        self.steps = state["steps"]


class Float32AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW (one pass over the weights) for float32 weights, no weight decay."""

    def __init__(self, parameters):
        super().__init__(parameters, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, lr: float) -> None:
        """One update of all weights from their .grad."""
        self.param_groups[0]["lr"] = lr
        super().step()


def train(model, examples: list[dict], args, folder: Path) -> list[float]:
    """Fine-tune all weights of `model` in place; returns the loss of every step.

    Constant learning rate after a linear warm-up, gradient norm clipped at --clip (Table 3).
    Every --save-every steps a checkpoint makes the run resumable, bit for bit on a CPU.
    """
    plan = batches(len(examples), args.batch_size, args.epochs, args.seed)
    warmup = max(1, math.ceil(args.warmup * len(plan)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    half = parameters[0].dtype == torch.bfloat16
    optimizer = (SplitAdamW if half else Float32AdamW)(parameters)
    torch.manual_seed(args.seed)  # for models with dropout
    losses = load_checkpoint(folder, model, optimizer) if args.resume else []
    check_head(model, examples[0])
    model.train()
    if args.checkpointing:
        enable_checkpointing(model)
    bar = tqdm(total=len(plan), initial=len(losses), desc="train", unit="step", disable=None)
    done_tokens, started = 0, time.perf_counter()
    for step in range(len(losses), len(plan)):
        batch = [examples[i] for i in plan[step]]
        loss = backward(model, batch, args.micro_batch, args.weighting)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"step {step + 1}: loss {loss}, gradient norm {norm}: training diverged. "
                f"Lower --lr (now {args.lr}) or use --dtype float32"
            )
        # (step + 1): even a run of one step moves the weights.
        optimizer.step(args.lr * min(1, (step + 1) / warmup))
        model.zero_grad()
        losses.append(loss)
        done_tokens += sum(map(length, batch))
        speed = sample.speed(done_tokens, started, model.device)
        bar.set_postfix_str(f"loss {loss:.3f}, {speed}", False)
        bar.update()
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < len(plan):
            save_checkpoint(folder, model, optimizer, losses)
    bar.close()
    model.eval()
    return losses


def enable_checkpointing(model) -> None:
    """Keep only each layer's input, and recompute the rest in the backward pass.

    It acts in training mode only. The method has two names across versions 5.x of the library.
    """
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@torch.no_grad()
def check_head(model, example: dict) -> None:
    """InputError if head_nll does not give this family's own logits (a scale that it lacks)."""
    ids = example["prompt"][-4:] + example["response"][:2]
    logits = model(torch.tensor([ids], device=model.device)).logits[0, -2].float()
    own = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-1], device=model.device))
    ours = response_nll(model, [{"prompt": ids[:-1], "response": ids[-1:]}])[0]
    if abs(own - ours) > 0.05 * abs(own) + 0.02:
        raise InputError(f"head_nll in upft.py does not fit {type(model).__name__} ({ours}, {own})")


def save_checkpoint(folder: Path, model, optimizer, losses) -> None:
    """Everything that training needs to go on; replaces the one before only when complete."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses,
             "random": torch.get_rng_state()}
    torch.save(state, folder / "checkpoint.pt.tmp")
    os.replace(folder / "checkpoint.pt.tmp", folder / "checkpoint.pt")


def load_checkpoint(folder: Path, model, optimizer) -> list[float]:
    """Restore the last checkpoint, if there is one; returns the losses of the steps done."""
    if not (folder / "checkpoint.pt").exists():
        return []
    state = torch.load(folder / "checkpoint.pt", map_location="cpu")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return state["losses"]


# ---- 4. the run ------------------------------------------------------------------------------


def parse_arguments(argv=None):
    """The flags, with the values that suit the model where they were not given."""
    raw = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=sample.Help)
    yes_no = argparse.BooleanOptionalAction
    sample.add_model_arguments(raw)
    g = raw.add_argument_group("questions")
    g.add_argument("--data", help="tiny, a prepared set or a JSONL file (default: tiny for tiny)")
    g.add_argument("--limit", type=int, help="only the first questions")
    g.add_argument("--eval-data", help="held-out questions with answers (default: tiny for tiny, "
                   "the test file of a prepared --data, else no evaluation)")
    g.add_argument("--eval-limit", type=int, help="only the first held-out questions")
    g = raw.add_argument_group("what is sampled and trained on")
    g.add_argument("--method", default="upft", choices=["upft", "sft", "rft"],
                   help="prefixes; full traces; full traces filtered by the label")
    g.add_argument("--prefix", type=int, default=8, help="t, tokens of a prefix")
    g.add_argument("--structure", type=float, default=0.1, help="p, share of full traces")
    g.add_argument("--temperature", type=float, default=0.6, help="of the training samples")
    g.add_argument("--samples", type=int, default=16, help="per question, for rft or the filter")
    g.add_argument("--label-filter", action="store_true", help="UPFT on samples that are right")
    g.add_argument("--samples-from", help="train on the samples of this JSONL file, made elsewhere")
    g.add_argument("--template", action=yes_no, default=True,
                   help="end the user turn of a prefix example with the paper's task template")
    g.add_argument("--eos", action=yes_no, default=False, help="end a prefix with an end of turn")
    g = raw.add_argument_group("training")
    g.add_argument("--lr", type=float, help="learning rate (default: 1e-5 for tiny, else 1e-6)")
    g.add_argument("--epochs", type=int, default=1, help="passes over the examples")
    g.add_argument("--batch-size", type=int, help="examples a step (default: 16 for tiny, else 64)")
    g.add_argument("--micro-batch", type=int, default=16, help="examples in memory at a time")
    g.add_argument("--checkpointing", action=yes_no,
                   help="recompute activations to save memory (default: not for tiny)")
    g.add_argument("--warmup", type=float, default=0.03, help="share of the steps that warm up")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    g.add_argument("--weighting", default="example", choices=["example", "token"],
                   help="what weighs the same in the loss")
    g = raw.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="of samples, full traces, batch order")
    g.add_argument("--out", help="the run's folder (default: a new one under out/)")
    g.add_argument("--save-every", type=int, default=100, help="steps between checkpoints, or 0")
    g.add_argument("--resume", action="store_true", help="go on with the stopped run in --out")
    args = raw.parse_args(argv)
    for name, value in (TINY_DEFAULTS if sample.is_tiny(args.model) else PAPER_DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    sample.fill_defaults(args)
    if args.method != "upft":
        args.structure = 1.0  # SFT and RFT are full traces and nothing else
    check_arguments(args)
    return args


def check_arguments(args) -> None:
    """InputError for a flag that makes no sense, before any work."""
    for name in ("structure", "warmup"):
        if not 0 <= getattr(args, name) <= 1:
            raise InputError(f"--{name} must lie between 0 and 1, not {getattr(args, name)}")
    if args.save_every < 0:
        raise InputError("--save-every must not be negative")
    if args.data is None and not args.samples_from:
        raise InputError("--data is needed with --model: a prepared set or a JSONL file")
    if args.label_filter and args.method != "upft":
        raise InputError("--label-filter belongs to --method upft (RFT filters by itself)")
    if args.samples_from and (args.label_filter or args.method == "rft"):
        raise InputError("--samples-from takes samples as they are: filter them before")
    if args.resume and not args.out:
        raise InputError("--resume needs --out, the folder of the run that was stopped")
    if args.eval_data is None and (sample.DATA / f"{args.data}_test.jsonl").exists():
        args.eval_data = args.data


def open_folder(args) -> Path:
    """Make the run's folder and write down its settings, or check that they are still the same."""
    name = f"out/{args.method}-t{args.prefix}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.out or name)
    # A resumed run may change what does not change the result.
    free = ("resume", "out", "save_every", "micro_batch", "token_budget", "checkpointing")
    settings = {k: v for k, v in vars(args).items() if k not in free}
    record = folder / "settings.json"
    if args.resume:
        if not record.exists():
            raise InputError(f"--resume: no run in {folder}")
        before = json.loads(record.read_text())
        changed = [f"--{k.replace('_', '-')}" for k in settings if settings[k] != before.get(k)]
        if changed:
            raise InputError(f"--resume: {', '.join(changed)} differ from the run in {folder}")
        return folder
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} is in use: give another --out, or --resume it")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, settings)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    return folder


def write_json(path: Path, value) -> None:
    """Write a JSON file under a temporary name, then give it its own."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def get_samples(model, tokenizer, questions, args, folder: Path, metrics: dict) -> list[dict]:
    """samples.jsonl, from disk where the run already made it."""
    path = folder / "samples.jsonl"
    if not path.exists():
        if args.samples_from:
            rows, cost = questions, {"sampled_tokens": 0, "sampling_seconds": 0.0,
                                     "questions": len(questions), "dropped_questions": 0}
        else:
            rows, cost = collect(model, tokenizer, questions, args, folder)
        if not rows:
            raise InputError("no sampled answer was right, so nothing is left to train on")
        metrics.update(cost)
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
    started = time.perf_counter()
    try:
        losses = train(model, examples, args, folder)
    except RuntimeError as error:
        if not sample.out_of_memory(error):
            raise
        raise InputError(f"training ran out of memory: lower --micro-batch (now "
                         f"{args.micro_batch}), then --out {folder} --resume") from None
    seconds, processed = time.perf_counter() - started, args.epochs * sum(map(length, examples))
    metrics |= {
        "examples": len(examples),
        "full_examples": sum(e["kind"] == "full" for e in examples),
        "full_cut_off": sum(r["kind"] == "full" and not r["finished"] for r in rows),
        "tuned_tokens": sum(len(e["response"]) for e in examples),
        "processed_tokens": processed,
        "training_seconds": seconds,
        "training_tokens_per_second": None if args.resume else processed / seconds,
        "training_peak_gib": sample.peak_memory(model.device, reset=True),
        "train_loss": losses,
    }
    model.save_pretrained(folder / "model.tmp")
    tokenizer.save_pretrained(folder / "model.tmp")
    write_json(folder / "metrics.json", metrics)
    os.replace(folder / "model.tmp", folder / "model")
    model.name_or_path = str((folder / "model").resolve())  # no longer the model it began as
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    few = math.ceil(len(losses) / 10)
    print(f"trained {len(losses)} steps on {len(examples):,} examples in "
          f"{metrics['training_seconds']:.1f} s, mean loss of the first {few} steps "
          f"{np.mean(losses[:few]):.3f}, of the last {np.mean(losses[-few:]):.3f} "
          f"-> {folder / 'model'}")
    return model


def measure(name, model, tokenizer, held_out, args, folder: Path, metrics: dict) -> list[dict]:
    """Greedy accuracy on the held-out questions (one completion, as in the paper)."""
    path, started = folder / f"predictions_{name}.jsonl", time.perf_counter()
    rows = read_jsonl(path) if path.exists() else evaluate.evaluate(
        model, tokenizer, held_out, out=path, max_new_tokens=args.max_new_tokens,
        instruction=args.instruction, token_budget=args.token_budget, label=f"evaluate {name}",
    )
    metrics[name] = evaluate.summarize(rows)
    metrics.setdefault(f"{name}_evaluation_seconds", time.perf_counter() - started)
    # Reset here as well, so that on a GPU the peak of training is not that of an evaluation.
    metrics[f"{name}_evaluation_peak_gib"] = sample.peak_memory(model.device, reset=True)
    write_json(folder / "metrics.json", metrics)
    print(f"{name}: {metrics[name]['correct']} of {metrics[name]['n']} right")
    return rows


def verdict(base: dict, tuned: dict, paired: dict) -> str:
    """What the comparison says, in words: beyond noise or not, and whether the model collapsed."""
    low, high = 100 * paired["low"], 100 * paired["high"]
    noise = "beyond noise" if low > 0 or high < 0 else "within noise"
    lines = [
        f"difference {100 * paired['difference']:+.1f} points, 95 % interval "
        f"[{low:+.1f}, {high:+.1f}], exact McNemar p = {paired['p']:.2g}: {noise}"
    ]
    if tuned["mean_tokens"] < 0.5 * base["mean_tokens"]:
        lines.append(
            f"COLLAPSE: answers have shrunk from {base['mean_tokens']:.0f} to "
            f"{tuned['mean_tokens']:.0f} tokens; the model has learned to stop, not to solve"
        )
    if tuned["no_answer"] + tuned["cut_off"] > base["no_answer"] + base["cut_off"] + 0.2:
        lines.append("COLLAPSE: many answers are now cut off or hold no answer at all")
    return "\n".join(lines)


def table(metrics: dict, paired: dict) -> str:
    """The run in one small table."""
    base, tuned = metrics["base"], metrics["tuned"]
    both = (base, tuned)
    percent = lambda name: [f"{100 * m[name]:.1f} %" for m in both]
    rows = [
        ["", "base", "tuned"],
        ["accuracy", *percent("accuracy")],
        ["95 % interval", *(f"{100 * m['low']:.1f} .. {100 * m['high']:.1f}" for m in both)],
        ["mean answer tokens", *(f"{m['mean_tokens']:.0f}" for m in both)],
        ["cut off", *percent("cut_off")],
        ["without an answer", *percent("no_answer")],
    ]
    lines = [f"{a:<20}{b:>16}{c:>16}" for a, b, c in rows]
    seconds = {
        "sampling": metrics["sampling_seconds"],
        "training": metrics["training_seconds"],
        "evaluation": metrics["base_evaluation_seconds"] + metrics["tuned_evaluation_seconds"],
    }
    return "\n".join([
        *lines,
        verdict(base, tuned, paired),
        f"{metrics['sampled_tokens']:,} sampled tokens, {metrics['tuned_tokens']:,} tuned tokens "
        f"in {metrics['examples']:,} examples ({metrics['full_examples']} full traces, "
        f"{metrics['full_cut_off']} cut off; {metrics['dropped_questions']} questions dropped)",
        "seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        + (" (a resumed run: of the last part only)" if metrics["resumed"] else ""),
    ])


def main(argv=None):
    """Sample, train, save, and compare the model before and after."""
    args = parse_arguments(argv)
    labels_needed = args.method == "rft" or args.label_filter
    questions = None if args.samples_from else sample.load_questions(
        args.data, "train", args.limit, need_answer=labels_needed
    )
    held_out = args.eval_data and sample.load_questions(
        args.eval_data, "test", args.eval_limit, need_answer=True
    )
    model, tokenizer = sample.load_model(args.model, args.device, args.dtype)
    if args.samples_from:
        questions = read_samples(tokenizer, args)
        sample.check_length(model, [r["prompt_ids"] + r["response_ids"] for r in questions], 0)
    suffix = SUFFIX if args.template and args.method == "upft" else ""
    for rows, end in ((questions if not args.samples_from else [], suffix), (held_out or [], "")):
        prompts = [sample.prompt_ids(tokenizer, q["question"], args.instruction, end) for q in rows]
        sample.check_length(model, prompts, args.max_new_tokens)
    folder = open_folder(args)
    print(f"run folder: {folder}", flush=True)
    record = folder / "metrics.json"
    metrics = json.loads(record.read_text()) if args.resume and record.exists() else {
        name: getattr(args, name) for name in ("method", "prefix", "structure", "seed", "model")
    }
    metrics["resumed"] = args.resume
    rows = get_samples(model, tokenizer, questions, args, folder, metrics)
    before = held_out and measure("base", model, tokenizer, held_out, args, folder, metrics)
    model = get_tuned(model, tokenizer, rows, args, folder, metrics)
    if not held_out:
        return print("no --eval-data, so nothing was measured")
    after = measure("tuned", model, tokenizer, held_out, args, folder, metrics)
    metrics["paired"] = evaluate.compare(before, after)
    write_json(record, metrics)
    print("\n" + table(metrics, metrics["paired"]))


if __name__ == "__main__":
    sample.run(main)
