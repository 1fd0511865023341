"""tests/reproduce.py: its statistics, its subcommands on a handful of questions."""

import argparse
import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
import torch

import evaluate
import sample
from sample import DATA, InputError


@pytest.fixture(scope="module")
def reproduce():
    path = DATA.parent / "tests/reproduce.py"
    spec = importlib.util.spec_from_file_location("reproduce", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_coverage_counts_trajectories_per_distinct_prefix(reproduce, tmp_path, monkeypatch, capsys):
    drawn = [[[1, 2], [1, 3], [1, 2], [4, 2]], [[5], [5], [5], [5]]]  # the second ends after one
    monkeypatch.setattr(reproduce, "draw", lambda *_, **__: drawn)
    reproduce.main(["coverage", "--out", str(tmp_path), "--lengths", "1", "2", "--questions", "2"])
    rows = json.loads((tmp_path / "coverage.json").read_text())["rows"]
    assert [(r["t"], r["mean"]) for r in rows] == [(1, (4 / 2 + 4) / 2), (2, (4 / 3 + 4) / 2)]


def test_rollouts_begin_with_the_trajectory_and_end_with_its_fate(reproduce, tmp_path, capsys):
    """From t = 0 both starts are one prompt; a start longer than any trajectory decides all."""
    reproduce.main(["rollouts", "--out", str(tmp_path), "--questions", "12", "--samples", "6",
                    "--rollouts", "3", "--lengths", "0", "4", "150"])  # fmt: skip
    found = json.loads((tmp_path / "rollouts.json").read_text())
    assert 0 < found["questions"] <= 12
    rows = {r["t"]: r for r in found["rows"]}
    assert all(r["gap"][1] <= r["gap"][0] <= r["gap"][2] for r in found["rows"])
    assert abs(rows[0]["gap"][0]) < 0.5
    assert rows[150]["right"][0] == 1 and rows[150]["wrong"][0] == 0


def test_the_interval_is_over_seeds_and_questions(reproduce):
    """As over questions alone when the seeds agree, and Student's t when only they differ."""
    rng = np.random.default_rng(0)
    questions = rng.choice([-1, 0, 1], 400, p=[0.1, 0.8, 0.1]) * 1.0
    width = lambda pair: pair[1] - pair[0]
    agree = width(reproduce.interval(np.stack([questions] * 4)))
    assert agree == pytest.approx(width(evaluate.bootstrap(questions)), rel=0.15)
    shifts = np.array([-0.3, -0.1, 0.1, 0.3])
    low, high = reproduce.interval(np.repeat(shifts[:, None], 400, 1))
    assert high == -low == pytest.approx(3.18 * shifts.std(ddof=1) / 2)
    assert width(reproduce.interval(questions[None])) == pytest.approx(agree)  # one seed


def test_tables_go_on_and_figures_are_drawn_from_them(reproduce, tmp_path, capsys, monkeypatch):
    flags = ["--out", str(tmp_path), "--limit", "16", "--eval-limit", "6", "--several", "3"]
    solutions = tmp_path / "solutions.jsonl"
    solutions.write_text('{"question": "How many?", "solution": "20 + 30 = 50."}\n')
    reproduce.main(["tables", *flags, "--methods", "upft", "rft", "--seeds", "0", "1", "--extra",
                    "--samples 2", "--solutions", str(solutions)])  # fmt: skip
    rows = json.loads((tmp_path / "tables.json").read_text())["rows"]
    assert [r["variant"] for r in rows] == ["base", "upft", "rft"]
    base, tuned, rft = rows
    assert tuned["difference"] == pytest.approx(tuned["accuracy"] - base["accuracy"])
    assert len(tuned["seeds"]) == 2 and rft["sampled_tokens"] > 5 * tuned["sampled_tokens"]
    assert base["log_likelihood"] < 0 and tuned["log_likelihood"] != base["log_likelihood"]
    assert np.mean(tuned["openings"]) == pytest.approx(tuned["opening"])
    # RFT minus UPFT on the same seeds and questions.
    assert rft["above"]["upft"][0] == pytest.approx(rft["difference"] - tuned["difference"])
    model = str(tmp_path / "tables/upft-seed0/model")  # a finished model alone
    reproduce.main(["tables", "--methods", "--model", model, "--eval-limit", "6", "--several", "0",
                    "--out", str(tmp_path / "alone")])  # fmt: skip
    [row] = json.loads((tmp_path / "alone/tables.json").read_text())["rows"]
    assert row["accuracy"] == tuned["seeds"][0]
    # Beside the tables, whose runs had other flags.
    flags[flags.index("--several") + 1] = "0"
    reproduce.main(["ablations", *flags, "--seeds", "0", "--only", "upft", "eos"])
    monkeypatch.setattr(reproduce.upft, "main", None)  # what is there is not made again
    reproduce.main(["ablations", *flags, "--seeds", "0", "--only", "eos"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="--eval-limit differ from the runs"):
        reproduce.main(["ablations", *flags, "--eval-limit", "7"])
    capsys.readouterr()
    reproduce.main(["figures", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "pip install matplotlib" in shown and "eos" in shown and "#" in shown


def test_rollouts_without_a_mixed_question_say_so(reproduce, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "draw", lambda *_, **__: [[[1]] * 16] * 4)
    with pytest.raises(InputError, match="right and a wrong"):
        reproduce.main(["rollouts", "--out", str(tmp_path), "--questions", "4"])


def test_openings_are_written_before_every_answer(reproduce, tmp_path, monkeypatch):
    """What is forced stands at the head of each answer; what all begin with changes nothing."""
    graded, grade = [], evaluate.grade
    monkeypatch.setattr(evaluate, "grade", lambda *pair: graded.append(pair[0]) or grade(*pair))
    reproduce.main(["openings", "--out", str(tmp_path), "--eval-limit", "8",
                    "--force", "Let's solve this", "Let's solve this in order."])  # fmt: skip
    free, same, forced = json.loads((tmp_path / "openings.json").read_text())["rows"]
    assert [r["begin so"] for r in (free, same)] == [1, 1] and forced["begin so"] < 1
    assert graded[:8] == graded[8:16] and free["mean_tokens"] == same["mean_tokens"]
    assert all(text.startswith("Let's solve this in order. ") for text in graded[16:])
    assert same["paired"]["won"] == same["paired"]["lost"] == 0


def test_the_figures_of_the_repository_can_be_drawn_as_text(reproduce, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reproduce.main(["figures", "--out", str(DATA / "figures")])
    shown = capsys.readouterr().out
    assert all(f"\n{name}\n" in shown for name in ("coverage", "rollouts", "ablations", "tables"))


def test_means_over_worlds_add_half_widths_in_squares(reproduce, tmp_path, capsys):
    for number, (difference, half) in enumerate([(0.01, 0.003), (0.03, 0.004)]):
        row = {"variant": "upft", "difference": difference, "low": difference - half,
               "high": difference + half, "above": {"sft": [0.02, 0.01, 0.03]}}  # fmt: skip
        (tmp_path / f"{number}.json").write_text(json.dumps({"rows": [{"variant": "base"}, row]}))
    reproduce.main(["pooled", "--files", *map(str, tmp_path.glob("*.json"))])
    upft, above = capsys.readouterr().out.splitlines()
    assert upft.split() == "upft +2.00 [+1.75, +2.25]".split()
    assert above.split() == "upft - sft +2.00 [+1.29, +2.71]".split()


def test_the_real_runs_are_compared_with_their_own_base(reproduce, tmp_path, capsys):
    runs = {"one": {"base": "0011" * 25, "a, seed 0": "0111" * 25, "b, seed 0": "1111" * 25},
            "two": {"base": "0001" * 25, "a, seed 1": "0001" * 25}}  # fmt: skip
    (tmp_path / "real.json").write_text(json.dumps({"what": "a test"} | runs))
    reproduce.main(["real", "--out", str(tmp_path)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    low, high = evaluate.newcombe(*(np.array([int(d) for d in text * 25])
                                    for text in ("0011", "0111")))  # fmt: skip
    assert f"a, seed 0 75.0%+25.0 [{100 * low:+.1f}, {100 * high:+.1f}]" in lines
    assert any(line.startswith("b, seed 0 - a, seed 0 +25.0 ") for line in lines)
    assert any(line.startswith("a, 2 seeds +12.5 ") for line in lines)
    own, added = (next(line for line in lines if line.startswith(start)) for start in (
        "a, 2 seeds +", "a, 2 seeds, with their noise +12.5 "))  # fmt: skip
    assert float(added.split("[")[1].split(",")[0]) < float(own.split("[")[1].split(",")[0])
    runs["two"] |= {"a, seed 0": "1111" * 25, "b, seed 0": "1111" * 25}  # run again: counts once
    (tmp_path / "real.json").write_text(json.dumps(runs))
    reproduce.main(["real", "--out", str(tmp_path)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("a, 2 seeds +37.5 ") for line in lines)
    assert any(line.startswith("b - a, means over seeds +37.5 ") for line in lines)
    assert not any(line.startswith("b, 2 ") for line in lines)


def test_bad_input_is_told_before_any_work_and_nothing_is_noted_down(reproduce, tmp_path):
    solutions = tmp_path / "solutions.jsonl"
    solutions.write_text('{"question": "How many?"}\n')
    for flags, expected in (
        (["tables", "--eval-data", "none.jsonl"], "no question file none.jsonl"),
        (["tables", "--data", str(solutions), "--methods", "rft"], 'no "answer"'),
        (["tables", "--solutions", str(solutions)], 'no "solution"'),
        (["coverage", "--questions", "0"], "--questions must be above 0"),
        (["coverage", "--limit", "20"], "--limit has no effect on coverage"),
        (["tables", "--samples", "4"], "--samples has no effect on tables"),
        (["tables", "--opening", "("], "no regular expression"),
        (["pooled", "--files", str(sample.DATA / "figures/coverage.json")], "no tables.json"),
        (["pooled"], "give --files"), (["figures"], "holds none of coverage.json"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=expected):
            reproduce.main([*flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_run_that_never_began_locks_nothing(reproduce, tmp_path):
    for model in ("/no/such/model", "/nor/this"):
        with pytest.raises(InputError, match="cannot load the model"):
            reproduce.main(["tables", "--model", model, "--out", str(tmp_path)])


def test_answers_to_other_questions_are_not_compared(reproduce, tmp_path):
    """A file was made anew under its old name, after the base had been asked."""
    row = {"question": "1 + 1?", "answer": "2", "correct": True}
    for name, question in (("base", "1 + 1?"), ("tuned", "2 + 2?")):
        sample.write_jsonl(tmp_path / name / "greedy.jsonl", [row | {"question": question}])
    args = argparse.Namespace(runs=tmp_path)
    assert reproduce.gains(args, [tmp_path / "base"]).tolist() == [[0.0]]
    with pytest.raises(InputError, match="the same questions"):
        reproduce.gains(args, [tmp_path / "tuned"])


def test_a_world_brings_its_own_questions(reproduce, tmp_path, monkeypatch):
    shutil.copytree(sample.TINY, tmp_path / "w1")
    found = []
    monkeypatch.setattr(reproduce, "compare", lambda args, *_: found.append(args))
    for flags in (["--model", str(tmp_path / "w1")], []):
        reproduce.main(["tables", *flags])
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    shutil.copytree(sample.TINY, tmp_path / "out/trap")
    reproduce.main(["failure"])
    assert found[2].data == str(tmp_path / "out/trap/train.jsonl") and "pairs" in found[2].opening
    assert [found[0].data, found[0].eval_data] == [
        str(tmp_path / "w1" / f"{split}.jsonl") for split in ("train", "test")]
    assert [found[1].data, found[1].eval_data] == ["tiny", "tiny"]


def test_few_bits_leave_few_values_in_a_block(reproduce, tmp_path):
    """16 values in 64 weights, each at most half a step from where it was; vectors as they were."""
    reproduce.main(["quantise", "--bits", "4", "--out", str(tmp_path)])
    old, _ = sample.load_model("tiny")
    new, _ = sample.load_model(tmp_path / "model")
    for a, b in zip(old.parameters(), new.parameters()):
        if a.dim() == 1:
            assert a.equal(b)
            continue
        blocks, rounded = a.data.view(-1, 64), b.data.view(-1, 64)
        assert max(len(set(block)) for block in rounded[:50].tolist()) == 16
        width = blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)
        assert ((rounded - blocks).abs() <= width / 30 + 1e-5).all()


def test_a_model_without_fitting_matrices_is_told(reproduce, tmp_path, monkeypatch):
    odd = torch.nn.Linear(63, 64)  # its numbers fill blocks of 64, but its rows do not
    before = odd.weight.detach().clone()
    monkeypatch.setattr(sample, "load_model", lambda *_: (odd, None))
    with pytest.raises(InputError, match="no matrix"):
        reproduce.main(["quantise", "--out", str(tmp_path)])
    assert odd.weight.equal(before) and not any(tmp_path.iterdir())


def test_the_world_where_it_fails_has_to_be_made_first(reproduce, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    with pytest.raises(InputError, match="--world trap"):
        reproduce.main(["failure"])


def test_the_gpu_arms_of_the_benchmark_run_on_tiny_shapes(monkeypatch):
    from tests import benchmark

    monkeypatch.setattr(benchmark, "QWEN", {"7B": None})  # --smoke never looks at the shape
    monkeypatch.setattr(benchmark, "ROWS", [])
    monkeypatch.setattr(benchmark, "FACTS", {
        "smoke": True, "float32 GFLOP/s": 1e3, "bfloat16 GFLOP/s": 1e3,
        "copy GB/s (read + write)": 1e2})  # fmt: skip
    args = argparse.Namespace(device="cpu", dtype="float32", smoke=True, repeats=1, prefix=4,
                              micro_batch=4)  # fmt: skip
    for arm in ("gpu-decode", "gpu-prefill", "gpu-train-7b", "gpu-run"):
        before = len(benchmark.ROWS)
        benchmark.ARMS[arm](args)
        rows = benchmark.ROWS[before:]
        assert rows and all(0 < r["ours"] < np.inf and r["met"] is None for r in rows)
    assert {"generate", "plain (all logits)"} <= {r["peer_name"] for r in benchmark.ROWS}


def test_the_peers_of_the_benchmark_run_without_our_norms():
    from tests import benchmark

    args = argparse.Namespace(device="cpu", dtype="float32", smoke=True, micro_batch=4)
    model = benchmark.build("7B", args)
    fused = lambda: any("forward" in vars(module) for module in model.modules())
    prompts, batch = benchmark.random_prompts(2), benchmark.random_examples(4, 2, 0, 0)
    optimizer = argparse.Namespace(step=lambda lr: None)
    for peer in (lambda: benchmark.peer_generate(model, prompts, 2, (), 2),
                 lambda: benchmark.plain_step(model, batch, optimizer, args)):  # fmt: skip
        sample.fuse_norms(model)
        assert fused()
        peer()
        assert not fused()
