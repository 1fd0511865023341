"""Remake the paper's figures and tables, on the embedded miniature or on any model.

    python tests/reproduce.py coverage                     # Figure 2(a)
    python tests/reproduce.py rollouts                     # Figure 2(b)
    python tests/reproduce.py openings                     # what an opening is worth
    python tests/reproduce.py tables --seeds 0 1 2 3 4     # Tables 1 and 2
    python tests/reproduce.py ablations --seeds 0 1 2      # Figure 3 and further choices
    python tests/reproduce.py failure                      # a world where UPFT does harm
    python tests/reproduce.py figures                      # pictures of Figures 2, 3 and tables
    python tests/reproduce.py pooled --files W0 W1 W2      # means of the tables of several worlds
    python tests/reproduce.py real --out data/figures      # the intervals of its real.json
    python tests/reproduce.py quantise --bits 4            # a model that went through 4-bit weights

Each prints its numbers, and all but the last four write them to <out>/<name>.json. Fine-tuning
runs stay in <out>/tables and <out>/ablations, and what is already there is not made again: a
stopped reproduction goes on. Two processes can share one <out> once its base is measured, with
different --seeds; then run it once with all of them, for the table. (Their seconds are those of a
shared machine.) `tables --methods` without a name measures --model alone. With --model out/world,
a world of data/make_tiny.py, its own questions are the default.
"""

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import evaluate  # noqa: E402
import sample  # noqa: E402
import upft  # noqa: E402

METHODS = {  # Tables 1 and 2: what they train on is all that differs
    "sft": ["--method", "sft"],
    "rft": ["--method", "rft"],
    "upft": [],
    "upft + label filter": ["--label-filter"],
}
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 95 %, for 2 to 10 seeds
ABLATIONS = {  # one flag away from the defaults: t = 8, p = 0.1, template, no EOS, T = 0.6
    "upft": [],
    **{f"t = {t}": ["--prefix", str(t)] for t in (1, 2, 4, 16, 32)},
    "sft": ["--method", "sft"],  # t = all
    **{f"p = {p}": ["--structure", str(p)] for p in (0, 0.05, 0.3)},  # p = 1 is sft
    "eos": ["--eos"],
    "no template": ["--no-template"],
    "token weighting": ["--weighting", "token"],
    **{f"T = {t}": ["--temperature", str(t)] for t in (0.3, 1.0)},
    **{f"lr = {lr}": ["--lr", lr] for lr in ("3e-6", "3e-5")},  # the miniature's is 1e-5
    "4 epochs": ["--epochs", "4"],
}


# ---- what trajectories share -----------------------------------------------------------------


def load(args, need_answer: bool):
    """(model, tokenizer, questions, prompts, stop ids) of --model and --data."""
    questions = sample.load_questions(args.data, "train", args.questions, need_answer)
    model, tokenizer = sample.load_model(args.model, args.device, args.dtype)
    prompts = [sample.prompt_ids(tokenizer, q["question"], args.instruction) for q in questions]
    return model, tokenizer, questions, prompts, sample.stop_ids(model, tokenizer)


def draw(args, model, prompts, stops, *, n, limit, seed):
    """n responses to each prompt at --temperature."""
    return sample.generate(
        model, prompts, n=n, max_new_tokens=limit, temperature=args.temperature, eos_ids=stops,
        seed=seed, token_budget=args.token_budget, progress="sample",
    )  # fmt: skip


def coverage(args):
    """Figure 2(a): trajectories per distinct prefix of t tokens, mean over the questions."""
    model, _, _, prompts, stops = load(args, need_answer=False)
    drawn = draw(args, model, prompts, stops, n=args.samples, limit=max(args.lengths),
                 seed=args.seed)  # fmt: skip
    rows = []
    for t in args.lengths:
        shared = np.array([len(r) / len({tuple(ids[:t]) for ids in r}) for r in drawn])
        low, high = evaluate.bootstrap(shared)
        rows.append({"t": t, "mean": float(shared.mean()), "low": low, "high": high})
        print(f"t = {t:<4} {shared.mean():7.2f} trajectories a prefix  [{low:.2f}, {high:.2f}]")
    print(f"{len(prompts)} questions x {args.samples} samples, temperature {args.temperature}")
    save(args, "coverage", {"questions": len(prompts), "samples": args.samples, "rows": rows})


def rollouts(args):
    """Figure 2(b): success from the first t tokens of a right and of a wrong trajectory."""
    model, tokenizer, questions, prompts, stops = load(args, need_answer=True)
    right = lambda ids, q: evaluate.grade(
        tokenizer.decode(ids, skip_special_tokens=True), q["answer"])["correct"]  # fmt: skip
    starts = []  # (question number, a right trajectory, a wrong one)
    for i, row in enumerate(draw(args, model, prompts, stops, n=args.samples,
                                 limit=args.max_new_tokens, seed=args.seed)):  # fmt: skip
        graded = {right(ids, questions[i]): ids for ids in reversed(row)}
        if len(graded) == 2:
            starts.append((i, graded[True], graded[False]))
    if not starts:
        raise sample.InputError("no question had both a right and a wrong trajectory")
    print(f"{len(starts)} of {len(prompts)} questions had a right and a wrong trajectory")
    rows = []
    for t in args.lengths:
        # What ended within t tokens is over: nothing is sampled after it.
        cases = [(i, ids[:t]) for i, *both in starts for ids in both]
        open_ = [k for k, (_, ids) in enumerate(cases) if not (ids and ids[-1] in stops)]
        drawn = draw(args, model, [prompts[cases[k][0]] + cases[k][1] for k in open_], stops,
                     n=args.rollouts, limit=args.max_new_tokens - t, seed=args.seed + 1 + t)
        ends = {k: [cases[k][1] + new for new in row] for k, row in zip(open_, drawn)}
        success = np.array([
            np.mean([right(ids, questions[i]) for ids in ends.get(k, [start])])
            for k, (i, start) in enumerate(cases)
        ]).reshape(-1, 2)  # (questions, [right start, wrong start])  # fmt: skip
        row = {"t": t}
        for name, values in (("right", success[:, 0]), ("wrong", success[:, 1]),
                             ("gap", success[:, 0] - success[:, 1])):  # fmt: skip
            row[name] = [float(values.mean()), *evaluate.bootstrap(values)]
        rows.append(row)
        print(f"t = {t:<4}" + "  ".join(
            f"{name} {100 * m:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
            for name, (m, low, high) in list(row.items())[1:]))  # fmt: skip
    together = [r["t"] for r in rows if r["gap"][1] <= 0 <= r["gap"][2]]
    print(f"the curves part after t = {max(together, default=0)} "
          "(the last t at which the interval of the gap holds zero)")
    save(args, "rollouts", {"questions": len(starts), "rollouts": args.rollouts, "rows": rows})


def openings(args):
    """What an opening is worth: greedy accuracy on --eval-data with each of --force written first.

    Answers that happen to begin alike tell nothing of it, for easy and hard questions are opened
    differently. Here every question gets every opening, and the model goes on from there.
    """
    questions = sample.load_questions(args.eval_data, "test", args.eval_limit, need_answer=True)
    model, tokenizer = sample.load_model(args.model, args.device, args.dtype)
    prompts = [sample.prompt_ids(tokenizer, q["question"], args.instruction) for q in questions]
    stops, found, free = sample.stop_ids(model, tokenizer), [], None
    for text in ["", *args.force]:  # "": as the model likes
        start = tokenizer(text, add_special_tokens=False).input_ids if text else []
        drawn = sample.generate(
            model, [p + start for p in prompts], max_new_tokens=args.max_new_tokens - len(start),
            eos_ids=stops, token_budget=args.token_budget, progress="evaluate",
        )  # fmt: skip
        rows = [q | {"tokens": len(start + ids), "finished": not stops.isdisjoint(ids[-1:])}
                | evaluate.grade(tokenizer.decode(start + ids, skip_special_tokens=True),
                                 q["answer"])
                for q, [ids] in zip(questions, drawn)]  # fmt: skip
        free = free or rows
        row = {"opening": text, **evaluate.summarize(rows), "paired": evaluate.compare(free, rows)}
        row["paired"] |= {name: len(row["paired"][name]) for name in ("won", "lost")}
        row["begin so"] = np.mean([r["text"].startswith(text) for r in free])
        found.append(row)
        low, high = (100 * row["paired"][end] for end in ("low", "high"))
        print(f"{text or '(free)':<40} {100 * row['accuracy']:5.1f} %  {row['mean_tokens']:4.0f} "
              f"tokens  {100 * row['paired']['difference']:+5.1f} [{low:+.1f}, {high:+.1f}]  "
              f"{100 * row['begin so']:.1f} % of the free begin so")  # fmt: skip
    save(args, "openings", {"questions": len(questions), "rows": found})


# ---- fine-tuning runs ------------------------------------------------------------------------


def asked(args, model, tokenizer, path: Path, n: int = 1) -> list[dict]:
    """Graded answers to the held-out questions; n > 1: at T = 0.6, of the first --several only."""
    if path.exists():
        return sample.read_jsonl(path)
    questions = sample.load_questions(args.eval_data, "test", args.eval_limit, need_answer=True)
    return evaluate.evaluate(
        model, tokenizer, questions[: args.several] if n > 1 else questions, out=path, n=n,
        max_new_tokens=args.max_new_tokens, instruction=args.instruction, seed=args.seed,
        temperature=0.6 if n > 1 else 0.0, token_budget=args.token_budget, label=path.stem,
    )  # fmt: skip


@torch.no_grad()
def likelihood(args, model, tokenizer) -> float | None:
    """Mean log-likelihood a token of held-out reference solutions, where --solutions has some."""
    if not args.solutions:
        return None
    nll, tokens = 0.0, 0
    for row in sample.load_questions(args.solutions, "test", args.several or None):
        prompt = sample.prompt_ids(tokenizer, row["question"], args.instruction)
        response = tokenizer(row["solution"], add_special_tokens=False).input_ids
        nll += upft.response_nll(model, [{"prompt": prompt, "response": response}]).sum().item()
        tokens += len(response)
    return -nll / tokens


def measure(args, model_name, folder: Path) -> dict:
    """What a model can do: greedy, eight samples, likelihood of the reference solutions."""
    model, tokenizer = sample.load_model(model_name, args.device, args.dtype)
    result = {"greedy": evaluate.summarize(asked(args, model, tokenizer, folder / "greedy.jsonl"))}
    if args.several:
        rows = asked(args, model, tokenizer, folder / "several.jsonl", n=8)
        result["several"] = evaluate.summarize(rows)
    return result | {"log_likelihood": likelihood(args, model, tokenizer)}


def check_settings(args, need_answer: bool) -> None:
    """InputError where <out>/<command> holds runs of another model, or with other flags.

    And where a file is not as it should be: told before anything is noted down or measured.
    """
    sample.load_questions(args.data, "train", args.limit, need_answer)
    sample.load_questions(args.eval_data, "test", args.eval_limit, need_answer=True)
    solved = sample.load_questions(args.solutions, "test") if args.solutions else []
    if not all(sample.is_text(row.get("solution")) for row in solved):
        raise sample.InputError(f'{args.solutions}: a line has no "solution"')
    try:
        re.compile(args.opening)
    except re.error as error:
        raise sample.InputError(f"--opening is no regular expression: {error}") from None
    upft.parse_arguments(["--data", "tiny", *args.extra.split()])
    record = args.runs / "settings.json"
    names = ("model data eval_data eval_limit limit several solutions extra instruction "
             "max_new_tokens dtype seed").split()  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    if not list(args.runs.glob("*/*")):  # no run has begun: a model that could not be loaded
        record.parent.mkdir(parents=True, exist_ok=True)
        upft.write_json(record, settings)
    before = json.loads(record.read_text())
    changed = [f"--{name.replace('_', '-')}" for name in names if settings[name] != before[name]]
    if changed:
        raise sample.InputError(f"{', '.join(changed)} differ from the runs in {record.parent}: "
                                "choose another --out")  # fmt: skip


def base_of(args) -> dict:
    """The model before, measured once."""
    record = args.runs / "base" / "result.json"
    if not record.exists():
        upft.write_json(record, measure(args, args.model, record.parent))
    return json.loads(record.read_text())


def folder_of(args, variant: str, seed: int) -> Path:
    """Where a fine-tuning run lies: "t = 16" of seed 0 in ablations/t16-seed0."""
    return args.runs / f"{variant.replace(' = ', '').replace(' ', '-')}-seed{seed}"


def run(args, variant: str, flags: list[str], seed: int) -> dict:
    """One fine-tuning run and what it did; read from its folder where it is already there."""
    folder = folder_of(args, variant, seed)
    record = folder / "result.json"
    if not record.exists():
        resume = ["--resume"] if (folder / "settings.json").exists() else []
        upft.main(["--model", args.model, "--data", args.data, "--eval-data", "", "--seed",
                   str(seed), "--out", str(folder), "--device", args.device, "--dtype", args.dtype,
                   "--max-new-tokens", str(args.max_new_tokens), "--instruction", args.instruction,
                   "--token-budget", str(args.token_budget),
                   *(["--limit", str(args.limit)] if args.limit else []),
                   *args.extra.split(), *flags, *resume])  # fmt: skip
        metrics = json.loads((folder / "metrics.json").read_text())
        upft.write_json(record, metrics | measure(args, str(folder / "model"), folder))
    return json.loads(record.read_text())


def gains(args, folders: list[Path]) -> np.ndarray:
    """Tuned minus base, (runs, questions), of the greedy answers."""
    base, *tuned = (sample.read_jsonl(f / "greedy.jsonl") for f in [args.runs / "base", *folders])
    for rows in tuned:
        evaluate.compare(base, rows)  # InputError if these are answers to other questions
    return np.array([evaluate.question_means(rows) for rows in tuned]
                    ) - evaluate.question_means(base)  # fmt: skip


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of (seeds, questions): the noise of both, added in squares.

    Student's t for the few seeds (a bootstrap over three of them is far too narrow), a normal
    distribution for the many questions. With one seed it speaks of that run only.
    """
    seeds, questions = values.shape
    square = (evaluate.Z * values.mean(0).std(ddof=1)) ** 2 / questions
    if seeds > 1:
        t = dict(zip(range(2, 11), STUDENT)).get(seeds, STUDENT[-1])
        square += (t * values.mean(1).std(ddof=1)) ** 2 / seeds
    return float(values.mean() - square**0.5), float(values.mean() + square**0.5)


def with_interval(values: np.ndarray) -> list[float]:
    """[mean, low, high] of (seeds, questions)."""
    return [float(values.mean()), *interval(values)]


def compare(args, name: str, variants: dict) -> None:
    """Run every variant with every seed, print a row for each, save them as <name>.json."""
    check_settings(args, any({"rft", "--label-filter"} & set(f) for f in variants.values()))
    base = base_of(args)
    rows = [{"variant": "base", "accuracy": base["greedy"]["accuracy"], **extras([base]),
             "opening": opening(args, args.runs / "base")}]  # fmt: skip
    for seed in args.seeds:  # seed by seed, so that a part of the whole can be looked at early
        for variant, flags in variants.items():
            run(args, variant, flags, seed)
    folders = {v: [folder_of(args, v, seed) for seed in args.seeds] for v in variants}
    values = {v: gains(args, folders[v]) for v in variants}
    for variant, flags in variants.items():
        results = [run(args, variant, flags, seed) for seed in args.seeds]
        accuracies = [r["greedy"]["accuracy"] for r in results]
        difference, low, high = with_interval(values[variant])
        shares = [opening(args, folder) for folder in folders[variant]]
        # A resumed run knows the seconds of its last part only.
        whole = [r for r in results if not r["resumed"]]
        mean = lambda key, of: float(np.mean([r[key] for r in of])) if of else None
        rows.append({
            "variant": variant, "accuracy": float(np.mean(accuracies)), "seeds": accuracies,
            "sd": float(np.std(accuracies, ddof=1)) if len(results) > 1 else None,
            "difference": difference, "low": low, "high": high, **extras(results),
            "opening": float(np.mean(shares)), "openings": shares,
            "above": {other: with_interval(values[variant] - values[other])
                      for other in METHODS if other in values and other != variant},
            **{key: mean(key, results) for key in ("sampled_tokens", "tuned_tokens",
                                                   "processed_tokens")},
            **{key: mean(key, whole) for key in ("sampling_seconds", "training_seconds")},
        })  # fmt: skip
    for row in rows:
        print(line(row))
    print(f"seeds {args.seeds}; {base['greedy']['n']} questions; the intervals are over seeds and "
          "questions; mean@8, maj@8 and pass@8 at temperature 0.6")  # fmt: skip
    save(args, name, {"model": args.model, "questions": base["greedy"]["n"], "rows": rows})


def opening(args, folder: Path) -> float:
    """Share of the greedy answers whose beginning matches --opening."""
    rows = sample.read_jsonl(folder / "greedy.jsonl")
    return float(np.mean([bool(re.search(args.opening, row["text"][:100])) for row in rows]))


def extras(results: list[dict]) -> dict:
    """Means over the runs of what is measured beside the accuracy."""
    found = {"tokens": [r["greedy"]["mean_tokens"] for r in results],
             "log_likelihood": [r["log_likelihood"] for r in results]}  # fmt: skip
    for key in ("mean@8", "maj@8", "pass@8"):
        found[key] = [r.get("several", {}).get(key) for r in results]
    return {k: None if None in v else float(np.mean(v)) for k, v in found.items()}


def line(row: dict) -> str:
    """One variant in a table."""
    percent = lambda key: "      -" if row.get(key) is None else f"{100 * row[key]:6.1f}%"
    text = f"{row['variant']:<22}{percent('accuracy')}"
    if "difference" in row:
        text += (f" (sd{percent('sd')})  {100 * row['difference']:+5.1f} "
                 f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]".ljust(34))  # fmt: skip
    text = text.ljust(58) + "".join(f"  {k}{percent(k)}" for k in ("mean@8", "maj@8", "pass@8")
                                    if row.get(k) is not None)  # fmt: skip
    text += f"  opens so{percent('opening')}  {row['tokens']:5.0f} tokens an answer"
    if row["log_likelihood"] is not None:
        text += f"  log-likelihood {row['log_likelihood']:.4f}"
    if "difference" in row:
        text += f"  sampled {row['sampled_tokens']:,.0f}  tuned {row['tuned_tokens']:,.0f}"
        if row["training_seconds"] is not None:
            text += f"  {row['sampling_seconds']:.0f} + {row['training_seconds']:.0f} s"
    return text


def tables(args):
    """Tables 1 and 2: base, SFT, RFT, UPFT, UPFT + label filter."""
    compare(args, "tables", {name: METHODS[name] for name in args.methods})


def failure(args):
    """Tables of the world `data/make_tiny.py --world trap --out out/trap`."""
    if not Path(args.model).exists():
        raise sample.InputError("first make it: data/make_tiny.py --world trap --out out/trap")
    compare(args, "failure", {name: METHODS[name] for name in args.methods})


def pooled(args):
    """Means of the worlds whose tables.json are --files: of each method, and of their differences.

    The worlds are independent, so their half-widths add in squares.
    """
    try:
        worlds = [{r["variant"]: r for r in json.loads(Path(f).read_text())["rows"]}
                  for f in args.files]  # fmt: skip
    except (KeyError, ValueError, TypeError):
        raise sample.InputError("--files: one of them is no tables.json") from None
    if not worlds:
        raise sample.InputError("give --files: tables.json of several worlds")

    def show(name, parts):
        centre, low, high = 100 * np.array(parts).T
        half = (((high - low) / 2) ** 2).sum() ** 0.5 / len(parts)
        mean = centre.mean()
        print(f"{name:<44}{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]")

    for name, row in worlds[0].items():
        if name != "base" and all(name in w for w in worlds):
            show(name, [[w[name][key] for key in ("difference", "low", "high")] for w in worlds])
            above = [w[name].get("above", {}) for w in worlds]
            for other in (o for o in row.get("above", {}) if all(o in some for some in above)):
                show(f"  {name} - {other}", [w[name]["above"][other] for w in worlds])


def real(args):
    """Runs of the real model, from <out>/real.json: accuracy, difference to the base, and means.

    Then the differences between runs, and between means over seeds. Intervals hold the noise of
    the questions; those of several seeds' gains also with theirs, as in the miniature's tables.
    """
    digits = lambda text: np.array([int(d) for d in text])
    kind = lambda name: name.rsplit(", seed", 1)[0]
    show = lambda name, *parts: print("{:<66}{:+5.1f} [{:+.1f}, {:+.1f}]".format(
        name, *(100 * x for x in parts)))  # fmt: skip

    def means(name, *runs):
        """The last of `runs` (seeds, questions) minus the first, if there are two."""
        one = [r.mean(0, keepdims=True) for r in runs]
        show(name, *with_interval(one[-1] - one[0] if len(runs) > 1 else one[0]))
        if len(runs) == 1:
            show(f"{name}, with their noise", *with_interval(runs[0]))

    everywhere = {}
    for group, runs in json.loads((args.out / "real.json").read_text()).items():
        if group == "what":
            continue
        base, gained = digits(runs["base"]), {}  # gained: kind -> {name: gain}
        print(f"\n{group}: base {base.mean():.1%}")
        for name, text in runs.items():
            low, high = evaluate.newcombe(base, digits(text))
            if name != "base":
                gain = digits(text) - base
                gained.setdefault(kind(name), {})[name] = gain
                # A seed that was run with earlier code, too, counts once.
                everywhere.setdefault((kind(name), len(gain)), {})[name] = gain
                print(f"{name:<60}{digits(text).mean():6.1%}{100 * gain.mean():+5.1f} "
                      f"[{100 * low:+.1f}, {100 * high:+.1f}]")  # fmt: skip
        for one, other in itertools.combinations(gained.values(), 2):
            for a, b in itertools.product(one, other):
                show(f"  {b} - {a}", (other[b] - one[a]).mean(),
                     *evaluate.newcombe(base + one[a], base + other[b]))  # fmt: skip
            if len(one) + len(other) > 2:
                means(f"  {kind(b)} - {kind(a)}, means over seeds",
                      *(np.array(list(runs.values())) for runs in (one, other)))  # fmt: skip
    print("\nmeans over all seeds, each minus its own base")
    for (name, _), values in everywhere.items():
        if len(values) > 1:
            means(f"{name}, {len(values)} seeds", np.array(list(values.values())))


def ablations(args):
    """Figure 3: prefix length and structure share; and every other choice of ours."""
    chosen = args.only or ABLATIONS
    compare(args, "ablations", {k: flags for k, flags in ABLATIONS.items() if k in chosen})


def quantise(args):
    """Save --model in <out>/model with its matrices rounded to --bits bits and back.

    Of every 64 neighbouring weights of a row, 2^bits evenly spaced values from the least to the
    greatest remain. Vectors stay as they are, and matrices whose rows 64 does not divide. For the
    question whether training does harm because weights have gone through 4 bits.
    """
    model, tokenizer = sample.load_model(args.model, args.device, args.dtype)
    noise = total = 0.0
    for p in model.parameters():
        if p.dim() != 2 or p.shape[1] % 64:
            continue
        old = p.data.float().view(-1, 64)
        low, high = old.amin(1, keepdim=True), old.amax(1, keepdim=True)
        step = ((high - low) / (2**args.bits - 1)).clamp(min=1e-30)
        p.data = (((old - low) / step).round() * step + low).view(p.shape).to(p.dtype)
        noise += (p.data.float().view(-1, 64) - old).square().sum().item()
        total += old.square().sum().item()
    if not total:
        raise sample.InputError(f"{args.model} has no matrix whose rows 64 divides")
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    print(f"{args.bits} bits move the weights by {(noise / total) ** 0.5:.1%} of their norm -> "
          f"{args.out / 'model'}")


# ---- pictures --------------------------------------------------------------------------------


def bars(pairs, width: int = 50) -> None:
    """A chart in text: one (label, value) a line."""
    top = max(value for _, value in pairs) or 1
    for label, value in pairs:
        print(f"{label:>24} {value:8.3f} {'#' * round(width * value / top)}")


def figures(args):
    """Draw what the other commands found: <out>/*.json -> <out>/*.svg, or charts in text."""
    charts = {"coverage": draw_coverage, "rollouts": draw_rollouts, "ablations": draw_prefix,
              "tables": draw_cost}  # fmt: skip
    files = {name: args.out / f"{name}.json" for name in charts}
    found = {name: json.loads(p.read_text()) for name, p in files.items() if p.exists()}
    if not found:
        raise sample.InputError(f"{args.out} holds none of "
                                f"{', '.join(p.name for p in files.values())}")  # fmt: skip
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return text_figures(found)
    # The same numbers give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "upft", "svg.fonttype": "none"})
    for name in found:
        figure, axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
        charts[name](axes, found[name]["rows"])
        figure.savefig(args.out / f"{name}.svg", metadata={"Date": None, "Creator": None})
        print(args.out / f"{name}.svg")


def text_figures(found: dict) -> None:
    """The same numbers without matplotlib."""
    print("matplotlib is not installed (pip install matplotlib), so these are charts in text")
    for name, value in found.items():
        print(f"\n{name}")
        for key in ("right", "wrong") if name == "rollouts" else ("",):
            bars([(f"{key} t = {r['t']}" if "t" in r else r["variant"],
                   r[key][0] if key else r.get("mean", r.get("accuracy")))
                  for r in value["rows"]])  # fmt: skip


def draw_coverage(axes, rows):
    """Trajectories per distinct prefix against t."""
    t = [r["t"] for r in rows]
    axes.plot(t, [r["mean"] for r in rows], "o-")
    axes.fill_between(t, [r["low"] for r in rows], [r["high"] for r in rows], alpha=0.25)
    axes.set(xscale="log", ylim=(1, None), xlabel="prefix length t (tokens)",
             ylabel="trajectories per distinct prefix")  # fmt: skip
    axes.set_xticks(t, t)


def draw_rollouts(axes, rows):
    """Success after a right and after a wrong start against t."""
    t = [r["t"] for r in rows]
    for name in ("right", "wrong"):
        mean, low, high = np.array([r[name] for r in rows]).T
        axes.plot(t, mean, "o-", label=f"after the start of a {name} trajectory")
        axes.fill_between(t, low, high, alpha=0.25)
    axes.set(xlabel="tokens t of the start", ylabel="success of rollouts", ylim=(0, 1))
    axes.legend()


def draw_prefix(axes, rows):
    """Accuracy against the prefix length, every seed a point."""
    names = {f"t = {t}": t for t in (1, 2, 4)} | {"upft": 8}
    names |= {f"t = {t}": t for t in (16, 32)} | {"sft": "all"}
    found = {names[r["variant"]]: r for r in rows if r["variant"] in names}
    lengths = [t for t in names.values() if t in found]
    for x, t in enumerate(lengths):
        axes.plot([x] * len(found[t]["seeds"]), found[t]["seeds"], "o", color="C0")
    axes.plot([found[t]["accuracy"] for t in lengths], color="C0")
    axes.axhline(rows[0]["accuracy"], color="grey", linestyle="--", label="base")
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set(xlabel="prefix length t (tokens)", ylabel="accuracy")
    axes.legend()


def draw_cost(axes, rows):
    """Accuracy against the tokens that were sampled."""
    for row in rows[1:]:
        error = [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]
        axes.errorbar(row["sampled_tokens"], row["accuracy"], np.abs(error), fmt="o", capsize=3,
                      label=row["variant"])  # fmt: skip
    axes.axhline(rows[0]["accuracy"], color="grey", linestyle="--", label="base")
    axes.set(xscale="log", xlabel="sampled tokens", ylabel="accuracy")
    axes.legend()


# ---- script ----------------------------------------------------------------------------------


def save(args, name: str, value: dict) -> None:
    """<out>/<name>.json."""
    args.out.mkdir(parents=True, exist_ok=True)
    upft.write_json(args.out / f"{name}.json", value)
    print(f"-> {args.out / name}.json")


def main(argv=None):
    """Run one subcommand."""
    functions = (coverage, rollouts, openings, tables, ablations, failure, figures, pooled, real,
                 quantise)  # fmt: skip
    commands = {f.__name__: f for f in functions}
    parser = sample.model_parser(__doc__)
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    flag = parser.add_argument
    flag("command", choices=commands)
    flag("--eval-data", help="held-out questions (default: the world's own, or tiny)")
    flag("--eval-limit", type=int, help="only the first held-out questions")
    flag("--out", type=lambda name: Path(sample.user_path(name)), default=ROOT / "out/reproduce",
         help="folder of numbers and runs")
    flag("--temperature", type=float, default=0.6, help="of coverage and rollouts")
    flag("--questions", type=int, default=200, help="of coverage and rollouts")
    flag("--samples", type=int, help="a question (default: coverage 64, rollouts 16)")
    flag("--rollouts", type=int, default=32, help="from each start")
    flag("--lengths", type=int, nargs="+", help="values of t (default: powers of 2 up to 64)")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the fine-tuning runs")
    flag("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="of tables, failure")
    flag("--files", nargs="+", default=[], help="of pooled: tables.json of several worlds")
    flag("--bits", type=int, default=4, choices=range(1, 9), help="of quantise")
    flag("--only", nargs="+", choices=ABLATIONS, help="these ablations only")
    flag("--opening",
         help="count the answers that begin so (default: the miniature's worse strategy)")
    flag("--force", nargs="+", default=[f"Let's solve this {way}" for way in
                                        ("step by step.", "with the gains first.")],
         help="the beginnings of `openings`")
    flag("--several", type=int, default=500, help="questions with eight samples each, or 0")
    flag("--solutions", help='JSONL with "question" and "solution": measure its log-likelihood '
         "(of the first --several, if not 0)")
    flag("--extra", default="", help='for every run of upft.py, as in --extra="--lr 1e-6"')
    args = parser.parse_args(argv)
    trap = args.command == "failure" and args.model == "tiny"
    args.model = str(ROOT / "out/trap") if trap else args.model
    args.opening = args.opening or (
        "two changes|in pairs|in short steps" if args.command == "failure" else
        "gains first|by sorting|gains before")  # fmt: skip
    for name, split in (("data", "train"), ("eval_data", "test")):
        own = Path(sample.user_path(args.model)) / f"{split}.jsonl"  # of a world
        default = "tiny" if args.model == "tiny" or not own.exists() else str(own)
        setattr(args, name, getattr(args, name) or default)
    uses = {"limit": "tables ablations failure", "questions": "coverage rollouts",
            "temperature": "coverage rollouts", "samples": "coverage rollouts",
            "rollouts": "rollouts", "methods": "tables failure", "only": "ablations"}
    for name, users in uses.items():
        if getattr(args, name) != parser.get_default(name) and args.command not in users.split():
            raise sample.InputError(f"--{name} has no effect on {args.command}")
    sample.fill_defaults(args)
    args.runs = args.out / args.command  # of fine-tuning
    args.samples = args.samples or (64 if args.command == "coverage" else 16)
    args.lengths = args.lengths or [0] * (args.command == "rollouts") + [2**k for k in range(7)]
    if min(args.lengths) < 0:
        raise sample.InputError("--lengths must not be negative")
    commands[args.command](args)


if __name__ == "__main__":
    sample.run(main)
