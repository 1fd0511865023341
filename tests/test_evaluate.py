"""Statistics against hand-made and brute-force values; asking a small model, resuming,
the flags."""
import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import evaluate
import sample
from sample import InputError

CHARACTERS = " 0123456789abcdefghijklmnopqrstuvwxyz?+=#\n.\\{}"
SETTINGS = dict(max_new_tokens=40, seed=3)


def completion(correct, prediction="5", tokens=10, finished=True):
    return {"text": f"The answer is {prediction}.", "prediction": prediction, "correct": correct,
            "tokens": tokens, "finished": finished}


def rows_of(*per_question, **extra):
    """Rows from lists of 0/1 per question: rows_of([1], [0]) has one completion each."""
    rows = []
    for i, correct in enumerate(per_question):
        made = [completion(bool(c), "5" if c else "6") for c in correct]
        rows.append({"question": f"q{i}", "answer": "5", **extra}
                    | (made[0] if len(made) == 1 else {"completions": made}))
    return rows


@pytest.fixture(scope="module")
def small():
    """A random Llama over characters, with a chat template."""
    vocabulary = {c: i for i, c in enumerate(["<eos>", *CHARACTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    tokenizer.chat_template = ("{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
                               "{% if add_generation_prompt %}={% endif %}")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128, eos_token_id=0, bos_token_id=None,
        pad_token_id=0)).eval()
    model.config._name_or_path = "small"
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.3)
    model.lm_head.weight.data[0] *= 2                    # so that some completions end
    return model, tokenizer


@pytest.fixture
def questions():
    return [{"question": f"what is {i} + {i}?", "answer": str(2 * i), "level": str(1 + i % 2),
             "id": i} for i in range(6)]


# ---- statistics ----------------------------------------------------------------------------------


def test_wilson_against_the_equation_it_solves():
    # The bounds are the shares p for which the observed share is Z standard errors away.
    for correct, n in ((0, 10), (3, 30), (15, 30), (30, 30), (1234, 2000)):
        low, high = evaluate.wilson(correct, n)
        assert 0 <= low <= correct / n <= high <= 1
        for bound in {low, high} - {0.0, 1.0}:
            distance = abs(correct / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert distance == pytest.approx(evaluate.Z, rel=1e-6)
    low, high = evaluate.wilson(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-4) and high == pytest.approx(0.5962, abs=1e-4)


def test_summary_of_one_completion_per_question():
    rows = rows_of([1], [0], [1], [1])
    rows[1] |= completion(False, None, tokens=30, finished=False)
    summary = evaluate.summarize(rows)
    assert (summary["n"], summary["correct"], summary["accuracy"]) == (4, 3, 0.75)
    assert (summary["low"], summary["high"]) == evaluate.wilson(3, 4)
    assert (summary["mean_tokens"], summary["cut_off"], summary["no_answer"]) == (15, 0.25, 0.25)
    assert not any("@" in key for key in summary)


def test_several_completions_are_not_counted_as_independent():
    # 40 questions that are always or never right, 16 completions each: the interval has to be
    # the one of 40 questions, not of 640 completions.
    rows = rows_of(*[[i % 2] * 16 for i in range(40)])
    summary = evaluate.summarize(rows)
    low, high = evaluate.wilson(20, 40)
    assert summary["high"] - summary["low"] == pytest.approx(high - low, rel=0.15)
    assert summary["mean@16"] == summary["accuracy"] == 0.5
    assert summary["pass@1"] == summary["pass@16"] == summary["maj@16"] == 0.5


def test_a_few_questions_that_differ_do_not_make_an_interval_narrow():
    """30 questions, 8 completions each: one that is solved now and then must not say more than
    none does."""
    none, one = ([[0] * 8] * 30, [[1, 1, 1, 0, 0, 0, 0, 0]] + [[0] * 8] * 29)
    never, once = (evaluate.summarize(rows_of(*rows)) for rows in (none, one))
    assert once["high"] > never["high"] == pytest.approx(evaluate.wilson(0, 30)[1])
    same, more = (evaluate.compare(rows_of(*none), rows_of(*rows)) for rows in (none, one))
    assert more["high"] > same["high"] > 0.1 and more["low"] < 0
    half = [[1] * 8] * 15 + [[0] * 8] * 15               # many differ: the bootstrap alone
    means = np.array([1.0] * 15 + [0.0] * 15)
    low, high = evaluate.bootstrap(means)
    assert [evaluate.summarize(rows_of(*half))[k] for k in ("low", "high")] == [low, high]


def test_pass_at_k_is_the_average_over_all_subsets():
    for n, correct in itertools.product((1, 4, 6), (0, 1, 3, 6)):
        if correct > n:
            continue
        draws = [1] * correct + [0] * (n - correct)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(draws, k))
            average = sum(map(any, subsets)) / len(subsets)
            assert evaluate.pass_at(k, n, correct) == pytest.approx(average)


def test_majority_vote():
    def vote(*answers):
        return evaluate.majority_is_correct([completion(a in ("5", "5.0", "10/2"), a)
                                             for a in answers])

    assert vote("5", "6", "5") and not vote("6", "5", "6")
    assert vote("6", "5", "5.0", "6", "10/2")            # equal answers vote together
    assert vote("5", "6") and not vote("6", "5")         # a tie: the one that came first
    assert vote(None, None, None, "5") and not vote(None, None)
    assert vote("?", "?", "5", "5.0")                    # no answer, so not equal to another such
    # "10%" equals both, but has one vote: it must not collect those of two different answers.
    answers = "0.1", "0.1", "0.1", "10%", "10"
    assert not evaluate.majority_is_correct([completion(a in ("10%", "10"), a) for a in answers])


def test_mcnemar_is_the_exact_binomial_test():
    for won, lost in ((0, 0), (1, 0), (5, 0), (3, 7), (10, 2), (8, 8)):
        same = [1] * 20
        a = rows_of(*[[x] for x in same + [0] * won + [1] * lost])
        b = rows_of(*[[x] for x in same + [1] * won + [0] * lost])
        result = evaluate.compare(a, b)
        m = won + lost
        probabilities = [math.comb(m, i) / 2**m for i in range(m + 1)]
        two_sided = sum(p for p in probabilities if p <= probabilities[won] * (1 + 1e-9))
        assert result["p"] == pytest.approx(two_sided)
        assert result["won"] == list(range(21, 21 + won))
        assert result["lost"] == list(range(21 + won, 21 + m))
        assert result["difference"] == pytest.approx((won - lost) / (20 + m))
        assert result["low"] <= result["difference"] <= result["high"]


def test_the_paired_interval_covers_and_behaves_with_few_discordant_pairs():
    rng = np.random.default_rng(0)
    for n, gain, loss in ((30, 0.1, 0.05), (100, 0.02, 0.02), (300, 0.1, 0.04)):
        inside = 0
        for _ in range(600):
            kind = rng.choice(4, size=n, p=[gain, loss, 0.5, 0.5 - gain - loss])
            a, b = np.isin(kind, (1, 2)).astype(float), np.isin(kind, (0, 2)).astype(float)
            low, high = evaluate.newcombe(a, b)
            inside += low <= gain - loss <= high
        assert 0.92 < inside / 600 < 0.999
    for share in (0, 10, 30):                            # nothing differs: not a certainty
        same = np.array([1.0] * share + [0.0] * (30 - share))
        low, high = evaluate.newcombe(same, same)
        assert -0.13 < low < 0 < high < 0.13
    low, high = evaluate.newcombe(np.zeros(30), np.ones(30))
    assert 0.7 < low < high <= 1


def test_comparison_of_several_completions_is_over_questions():
    a, b = rows_of([0, 0, 1], [1, 1, 1], [0, 0, 0]), rows_of([1, 0, 1], [1, 1, 1], [0, 0, 0])
    result = evaluate.compare(a, b)
    assert result["won"] == [1] and result["lost"] == [] and result["p"] == 1
    assert result["difference"] == pytest.approx(1 / 9)


def test_comparing_different_questions_is_refused():
    rows = rows_of([1], [0])
    for other in (rows[:1], rows[::-1], [rows[0], rows[1] | {"answer": "7"}]):
        with pytest.raises(InputError, match="same questions"):
            evaluate.compare(rows, other)


# ---- asking a model ------------------------------------------------------------------------------


def test_one_completion_lies_flat_in_its_row(small, questions):
    rows = evaluate.evaluate(*small, questions, **SETTINGS)
    assert set(rows[0]) == {"question", "answer", "level", "text", "prediction", "correct",
                            "tokens", "finished"}
    assert evaluate.summarize(rows)["n"] == len(questions)


def test_rows_come_in_question_order_with_everything_counted(small, questions, tmp_path):
    model, tokenizer = small
    out = tmp_path / "deep" / "p.jsonl"
    rows = evaluate.evaluate(model, tokenizer, questions, out=out, n=2, temperature=1.0, **SETTINGS)
    assert [row["question"] for row in rows] == [q["question"] for q in questions]
    assert sample.read_jsonl(out) == rows and not list(out.parent.glob("*.part"))
    stops = sample.stop_ids(model, tokenizer)
    prompts = [sample.prompt_ids(tokenizer, q["question"]) for q in questions]
    drawn = sample.generate(model, prompts, n=2, temperature=1.0, eos_ids=stops, **SETTINGS)
    for row, question, samples in zip(rows, questions, drawn):
        assert row["answer"] == question["answer"] and row["level"] == question["level"]
        for got, ids in zip(row["completions"], samples):
            assert got["tokens"] == len(ids) and got["finished"] == (ids[-1] in stops)
            assert got["text"] == tokenizer.decode(ids, skip_special_tokens=True)
            assert "<eos>" not in got["text"]
            assert got["prediction"] == evaluate.extract_answer(got["text"])
            assert got["correct"] == evaluate.is_correct(got["prediction"], row["answer"])
    finished = [c["finished"] for row in rows for c in row["completions"]]
    assert True in finished and False in finished


def test_an_interrupted_run_goes_on_where_it_was(small, questions, tmp_path, monkeypatch):
    model, tokenizer = small
    options = dict(n=2, temperature=1.0, **SETTINGS)
    whole = evaluate.evaluate(model, tokenizer, questions, **options)
    out, part = tmp_path / "p.jsonl", tmp_path / "p.jsonl.part"
    real_generate, asked = sample.generate, []

    def stop_after_seven(model, prompts, *, on_done, **options):
        done = []

        def on_seven(*ended):
            if len(done) == 7:
                raise KeyboardInterrupt
            done.append(ended)
            on_done(*ended)

        return real_generate(model, prompts, on_done=on_seven, **options)

    monkeypatch.setattr(sample, "generate", stop_after_seven)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(model, tokenizer, questions, out=out, **options)
    assert not out.exists() and len(part.read_text().splitlines()) == 1 + 7
    part.write_text(part.read_text()[:-9])               # the last line is torn: six are left
    monkeypatch.setattr(sample, "generate", lambda model, prompts, **kw: asked.append(
        kw["keys"]) or real_generate(model, prompts, **kw))
    assert evaluate.evaluate(model, tokenizer, questions, out=out, **options) == whole
    assert 3 <= len(asked[0]) < len(questions) and not part.exists()


def test_a_part_file_of_another_run_is_refused(small, questions, tmp_path):
    model, tokenizer = small
    out, part = tmp_path / "p.jsonl", tmp_path / "p.jsonl.part"
    part.write_text('{"max_new_tokens": %d, "n": 1}\n' % SETTINGS["max_new_tokens"])
    before = part.read_text()
    with pytest.raises(InputError, match=r"another temperature \(None, now 0.0\)"):
        evaluate.evaluate(model, tokenizer, questions, out=out, **SETTINGS)
    assert part.read_text() == before
    part.unlink()
    too_long = SETTINGS | {"max_new_tokens": 10**6}
    with pytest.raises(InputError, match="context"):     # leaves nothing that a next run would meet
        evaluate.evaluate(model, tokenizer, questions, out=out, **too_long)
    assert not part.exists()
    part.write_text('{"sett')                            # stopped in the first line: starts again
    evaluate.evaluate(model, tokenizer, questions, out=out, **SETTINGS)
    assert len(sample.read_jsonl(out)) == len(questions)


def test_a_part_file_of_other_weights_under_the_same_name_is_refused(
        small, questions, tmp_path, monkeypatch):
    """A run was stopped, its model trained again into the same folder, and the command repeated."""
    model, tokenizer = copy.deepcopy(small[0]), small[1]
    out = tmp_path / "p.jsonl"
    monkeypatch.setattr(sample, "write_jsonl", stop_at(out, sample.write_jsonl))
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(model, tokenizer, questions, out=out, **SETTINGS)
    monkeypatch.undo()
    rounded = copy.deepcopy(model).bfloat16()
    with pytest.raises(InputError, match="another dtype"):
        evaluate.evaluate(rounded, tokenizer, questions, out=out, **SETTINGS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-6
    with pytest.raises(InputError, match="another set of weights"):
        evaluate.evaluate(model, tokenizer, questions, out=out, **SETTINGS)


def stop_at(path, write):
    """write_jsonl that is stopped when it comes to `path`."""
    def stopping(file, rows):
        if file == path:
            raise KeyboardInterrupt
        write(file, rows)

    return stopping


# ---- the script ----------------------------------------------------------------------------------


@pytest.fixture
def files(small, questions, tmp_path):
    """A saved model and a question file."""
    model, tokenizer = small
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sample.write_jsonl(tmp_path / "q.jsonl", questions)
    return tmp_path


def run_script(capsys, *argv):
    """Exit code, stdout, stderr of evaluate.py with these flags."""
    code = 0
    try:
        sample.run(lambda: evaluate.main([str(a) for a in argv]))
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def test_the_script_end_to_end(files, capsys):
    ask = ["--model", files / "model", "--data", files / "q.jsonl", "--max-new-tokens", 12,
           "--instruction", ""]
    code, out, err = run_script(capsys, *ask, "--out", files / "a.jsonl")
    assert code == 0 and "level 1" in out and "level 2" in out and "all" in out
    assert "one question = 17 points" in out and "\r" not in err
    code, out, _ = run_script(capsys, *ask, "--out", files / "b.jsonl", "--n", 4, "--limit", 5)
    assert code == 0 and all(word in out for word in ("mean@4", "maj@4", "pass@2", "pass@4"))
    rows = sample.read_jsonl(files / "b.jsonl")
    assert len(rows) == 5 and len({c["text"] for c in rows[0]["completions"]}) > 1
    code, _, err = run_script(capsys, *ask, "--out", files / "a.jsonl")
    assert code == 2 and "exists already" in err


def test_regrade_needs_only_the_text(tmp_path, capsys):
    rows = rows_of([1], [1], [0])
    rows[0] |= {"correct": False, "prediction": "nonsense"}
    path = tmp_path / "p.jsonl"
    sample.write_jsonl(path, rows)
    code, out, _ = run_script(capsys, "--regrade", path, "--out", tmp_path / "new.jsonl")
    assert code == 0 and "1 verdicts changed" in out and "66.7 %" in out
    assert sample.read_jsonl(path) == rows
    assert sample.read_jsonl(tmp_path / "new.jsonl") == rows_of([1], [1], [0])
    code, out, _ = run_script(capsys, "--regrade", path)
    assert sample.read_jsonl(path) == rows_of([1], [1], [0])


def test_compare_says_what_one_question_weighs(tmp_path, capsys):
    before, after = [[i < 10] for i in range(30)], [[2 <= i < 11] for i in range(30)]
    sample.write_jsonl(tmp_path / "a.jsonl", rows_of(*before))
    sample.write_jsonl(tmp_path / "b.jsonl", rows_of(*after))
    code, out, _ = run_script(capsys, "--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert code == 0 and "one question = 3.3 points" in out
    assert "-3.3 points" in out and "p = 1" in out
    won, lost = out.splitlines()[-2:]
    assert won.split(":")[1].split() == ["11"] and lost.split(":")[1].split() == ["1", "2"]


@pytest.mark.parametrize("argv, message", [
    ([], "give --data"), (["--data", "q.jsonl"], "give --data"),
    (["--regrade", "none.jsonl"], "none.jsonl"), (["--regrade", "q.jsonl"], "q.jsonl, row 1"),
    (["--regrade", "broken.jsonl"], "broken.jsonl, line 1"),
    (["--regrade", "empty.jsonl"], "no rows"),
    (["--compare", "p.jsonl", "other.jsonl"], "same questions"),
    (["--data", "none.jsonl", "--out", "x.jsonl"], "none.jsonl"),
    (["--data", "unlabelled.jsonl", "--out", "x.jsonl"], "answer"),
    (["--data", "q.jsonl", "--out", "x.jsonl", "--n", "0"], "--n"),
    (["--data", "q.jsonl", "--out", "x.jsonl", "--temperature", "-1"], "--temperature"),
    (["--data", "q.jsonl", "--out", "x.jsonl", "--model", "no-such-model"], "no-such-model"),
    (["--data", "q.jsonl", "--out", "p.jsonl"], "exists already"),
    (["--regrade", "p.jsonl", "--out", "other.jsonl"], "exists already"),
    (["--regrade", "types.jsonl"], "types.jsonl, row 1"),
    (["--regrade", "list.jsonl"], "list.jsonl, row 1"),
    (["--data", "q.jsonl", "--out", "x.jsonl", "--temperature", "nan"], "--temperature"),
    (["--data", "q.jsonl", "--out", "x.jsonl", "--seed", str(2**64)], "--seed"),
])
def test_bad_input_is_one_clear_line_and_exit_code_2(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample.write_jsonl("q.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    sample.write_jsonl("unlabelled.jsonl", [{"question": "1 + 1?"}])
    sample.write_jsonl("p.jsonl", rows_of([1], [0]))
    sample.write_jsonl("other.jsonl", rows_of([1]))
    sample.write_jsonl("types.jsonl", [row | {"answer": 5} for row in rows_of([1])])
    sample.write_jsonl("list.jsonl", [row | {"completions": 5} for row in rows_of([1])])
    (tmp_path / "broken.jsonl").write_text('{"question": \n')
    (tmp_path / "empty.jsonl").write_text("")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = run_script(capsys, *argv)
    assert code == 2 and err.startswith("error: ") and message in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
