"""The command line end to end on the embedded model, and what it says to bad input."""

import argparse
import ast
import importlib.util
import io
import json
import random
import shutil
import subprocess
import sys
import tokenize

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GraniteConfig

import sample
import upft
from sample import DATA, TINY, InputError, read_jsonl

SHORT = ["--limit", "40", "--eval-limit", "30", "--batch-size", "8"]


def run_upft(folder, *flags):
    upft.main([*SHORT, "--out", str(folder), *flags])
    return json.loads((folder / "metrics.json").read_text())


def weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return model.state_dict()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run that several tests look at."""
    folder = tmp_path_factory.mktemp("run") / "upft"
    return folder, run_upft(folder, "--save-every", "2")


def test_a_run_leaves_what_the_readme_promises(finished, capsys):
    folder, metrics = finished
    names = {"samples.jsonl", "metrics.json", "settings.json", "model", "predictions_base.jsonl",
             "predictions_tuned.jsonl"}
    assert {p.name for p in folder.iterdir()} == names  # and no .part, .tmp or checkpoint
    rows = read_jsonl(folder / "samples.jsonl")
    assert len(rows) == 40 and sum(r["kind"] == "full" for r in rows) == 4
    prefixes = [r for r in rows if r["kind"] == "prefix"]
    assert all(len(r["response_ids"]) == 8 for r in prefixes)
    full = [r for r in rows if r["kind"] == "full"]
    assert metrics["sampled_tokens"] == metrics["tuned_tokens"] == sum(
        len(r["response_ids"]) for r in rows)
    assert metrics["sampled_tokens"] == 36 * 8 + sum(len(r["response_ids"]) for r in full)
    assert metrics["base"]["n"] == metrics["tuned"]["n"] == 30
    assert len(metrics["train_loss"]) == 5
    assert metrics["base"]["correct"] == round(metrics["base"]["accuracy"] * 30)
    assert metrics["paired"]["difference"] == pytest.approx(
        metrics["tuned"]["accuracy"] - metrics["base"]["accuracy"])


def test_the_saved_model_loads_in_plain_transformers_and_answers(finished):
    folder, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    chat = [{"role": "user", "content": read_jsonl(TINY / "test.jsonl")[0]["question"]}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=160, do_sample=False)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "\\boxed{" in text
    assert text == read_jsonl(folder / "predictions_tuned.jsonl")[0]["text"]


def test_the_prefix_is_the_first_t_tokens_of_the_full_sample(tmp_path, finished):
    """Decoding t tokens gives what cutting the full trace would give, at a fraction of the cost."""
    rows = read_jsonl(finished[0] / "samples.jsonl")
    model, tokenizer = sample.load_model("tiny")
    prompts = [sample.prompt_ids(tokenizer, r["question"]) for r in rows]
    stops = sample.stop_ids(model, tokenizer)
    full = sample.generate(model, prompts, max_new_tokens=60, temperature=0.6, eos_ids=stops)
    for row, [ids] in zip(rows, full):
        if row["kind"] == "prefix":
            assert row["response_ids"] == ids[:8]


def test_training_prompts_carry_the_suffix_and_sampling_prompts_do_not(tmp_path, finished):
    _, tokenizer = sample.load_model("tiny")
    rows = read_jsonl(finished[0] / "samples.jsonl")
    for row in rows:
        suffix = upft.SUFFIX if row["kind"] == "prefix" else ""
        assert row["prompt_ids"] == sample.prompt_ids(tokenizer, row["question"], "", suffix)
        assert row["prompt"][0]["content"].endswith(upft.SUFFIX) == (row["kind"] == "prefix")
    run_upft(tmp_path / "plain", "--no-template", "--eos", "--checkpointing")
    for row, plain in zip(rows, read_jsonl(tmp_path / "plain" / "samples.jsonl")):
        assert plain["response_ids"] == row["response_ids"]
        assert plain["prompt"][0]["content"] == row["question"]


def test_no_label_is_read(tmp_path, finished):
    """Without any answers in the training file: the same samples and the same weights."""
    unlabelled = tmp_path / "questions.jsonl"
    questions = read_jsonl(TINY / "train.jsonl")[:40]
    sample.write_jsonl(unlabelled, [{"question": q["question"]} for q in questions])
    folder = tmp_path / "run"
    run_upft(folder, "--data", str(unlabelled), "--eval-limit", "2")
    for ours, labelled in zip(*(read_jsonl(f / "samples.jsonl") for f in (folder, finished[0]))):
        assert ours["response_ids"] == labelled["response_ids"] and "answer" not in ours
    assert same(weights(folder), weights(finished[0]))


def test_seed_decides_and_batch_size_of_sampling_does_not(tmp_path, finished):
    again, other = tmp_path / "again", tmp_path / "other"
    run_upft(again, "--token-budget", "400", "--eval-limit", "1")
    run_upft(other, "--seed", "1", "--eval-limit", "1")
    ids = lambda f: [r["response_ids"] for r in read_jsonl(f / "samples.jsonl")]
    assert ids(again) == ids(finished[0]) != ids(other)
    assert same(weights(again), weights(finished[0]))
    assert not same(weights(other), weights(finished[0]))


@pytest.mark.parametrize("stop_at", ["sampling", "training", "evaluation"])
def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path, finished, monkeypatch, stop_at):
    folder, calls, flags = tmp_path / "run", [], ["--save-every", "2"]
    names = {"sampling": (sample, "decode"), "training": (upft, "backward"),
             "evaluation": (sample, "decode")}
    module, name = names[stop_at]
    original = getattr(module, name)
    # Sampling: prefixes in one call of decode, full traces in the next, then each evaluation.
    limit = {"sampling": 1, "training": 3, "evaluation": 3}[stop_at]

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > limit:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_upft(folder, *flags)
    monkeypatch.setattr(module, name, original)
    if stop_at == "sampling":
        part = folder / "samples.jsonl.part"
        assert len(read_jsonl(part)) == 1 + 36  # settings, then one line a sample
        part.write_bytes(part.read_bytes()[:-5])  # torn in the middle of its last line
    metrics = run_upft(folder, *flags, "--resume")
    assert metrics["train_loss"] == finished[1]["train_loss"]
    assert same(weights(folder), weights(finished[0]))
    assert metrics["paired"] == finished[1]["paired"]
    assert not list(folder.glob("*.part")) + list(folder.glob("*.tmp"))


def test_methods_differ_only_in_what_is_trained_on(tmp_path):
    sft = run_upft(tmp_path / "sft", "--method", "sft", "--eval-limit", "1")
    rows = read_jsonl(tmp_path / "sft" / "samples.jsonl")
    assert {r["kind"] for r in rows} == {"full"} and sft["sampled_tokens"] == sft["tuned_tokens"]
    rft = run_upft(tmp_path / "rft", "--method", "rft", "--samples", "4", "--eval-limit", "1")
    rows = read_jsonl(tmp_path / "rft" / "samples.jsonl")
    assert rft["dropped_questions"] + len(rows) == 40 and len(rows) > 0
    for row in rows:
        answer = upft.evaluate.extract_answer(row["completion"][0]["content"])
        assert upft.evaluate.is_correct(answer, row["answer"])
    assert rft["sampled_tokens"] > 2 * rft["tuned_tokens"]
    run_upft(tmp_path / "filter", "--label-filter", "--samples", "4", "--eval-limit", "1")
    kept = {r["question"]: r for r in read_jsonl(tmp_path / "filter" / "samples.jsonl")}
    assert kept.keys() == {r["question"] for r in rows}
    for row in rows:
        other = kept[row["question"]]
        length = 8 if other["kind"] == "prefix" else None
        assert other["response_ids"] == row["response_ids"][:length]


def tiny_without(tmp_path, name, **config):
    """A copy of the embedded model that lacks a file or has another setting."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / name).unlink() if name else None
    if config:
        values = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def tiny_with_template(tmp_path, template):
    """A copy of the embedded model with this chat template."""
    folder = tiny_without(tmp_path, "")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    return folder


def write(tmp_path, text):
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    return str(path)


def granite(tmp_path):
    """A family that scales its logits, which head_nll does not."""
    config = GraniteConfig(vocab_size=1024, hidden_size=32, intermediate_size=64,
                           num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                           logits_scaling=9.0, initializer_range=0.5)  # fmt: skip
    folder = tmp_path / "granite"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


BAD = {
    "missing file": (lambda t: ["--data", "none.jsonl"], "no question file none.jsonl"),
    "unknown set": (lambda t: ["--data", "gsm9k"], "data/prepare.py"),
    "empty file": (lambda t: ["--data", write(t, "")], "holds no questions"),
    "broken line": (lambda t: ["--data", write(t, '{"question": "1?"}\n{"quest\n')], "line 2"),
    "not an object": (lambda t: ["--data", write(t, '{"question": "1?"}\n7\n')], "line 2"),
    "no question": (lambda t: ["--data", write(t, '{"answer": "1"}\n')], 'no "question"'),
    "no answer": (lambda t: ["--eval-data", write(t, '{"question": "1?"}\n')], 'no "answer"'),
    "whole solutions": (
        lambda t: ["--eval-data", write(t, '{"question": "1?", "answer": "1 #### 1"}\n')],
        "whole solution"),
    "blank answer": (
        lambda t: ["--eval-data", write(t, '{"question": "1?", "answer": " "}\n')], 'no "answer"'),
    "other layers": (
        lambda t: ["--model", tiny_without(t, "", layer_types=["linear_attention"] * 4)],
        "not keys and values"),
    "compressed layers": (
        lambda t: ["--model", tiny_without(t, "", layer_types=["compressed_sparse_attention"] * 4)],
        "not keys and values"),
    "a template that refuses": (
        lambda t: ["--model", tiny_with_template(t, "{{ raise_exception('no such role') }}"),
                   "--data", "tiny"],
        "no such role"),
    "nobody's folder": (lambda t: ["--data", "~nobody-at-all/q.jsonl"], "no question file"),
    "other logits": (lambda t: ["--model", granite(t), "--data", "tiny"], "head_nll in upft.py"),
    "rft without labels": (
        lambda t: ["--method", "rft", "--data", write(t, '{"question": "1?"}\n')], 'no "answer"'),
    "no such model": (lambda t: ["--model", str(t), "--data", "tiny"], "cannot load the model"),
    "no data for a model": (lambda t: ["--model", "some/model"], "--data is needed"),
    "prefix 0": (lambda t: ["--prefix", "0"], "--prefix must be above 0"),
    "structure 1.5": (lambda t: ["--structure", "1.5"], "--structure must lie between 0 and 1"),
    "save-every -1": (lambda t: ["--save-every", "-1"], "--save-every must not be negative"),
    "lr 0": (lambda t: ["--lr", "0"], "--lr must be above 0"),
    "lr inf": (lambda t: ["--lr", "inf"], "--lr must be above 0 and finite"),
    "no such folder": (lambda t: ["--model", "/no/folder", "--data", "tiny"], "no such folder"),
    "no chat template": (
        lambda t: ["--model", tiny_without(t, "chat_template.jinja"), "--data", "tiny"],
        "no chat template"),
    "context": (
        lambda t: ["--model", tiny_without(t, "", max_position_embeddings=170), "--data", "tiny"],
        "exceeds the model's context of 170"),
    "context, of a prefix": (lambda t: ["--prefix", "1000"], "upft.py's --prefix"),
    "half a character": (lambda t: ["--data", write(t, '{"question": "\\ud800"}\n')], "surrogate"),
    "folder in use": (lambda t: ["--out", str(TINY)], "is in use"),
    "nothing to resume": (lambda t: ["--out", str(t / "none"), "--resume"], "no run in"),
    "resume what": (lambda t: ["--resume"], "--resume needs --out"),
    "device": (lambda t: ["--device", "cuda:99"], "cuda:99"),
    "device of another kind": (lambda t: ["--device", "mps"], "only cpu and cuda"),
    "no text": (lambda t: ["--instruction", "caf\udce9"], "--instruction is blank or not valid"),
    "diverging": (lambda t: ["--lr", "1e38", "--limit", "40", "--eval-limit", "1"], "step 2: loss"),
    "diverging at the end": (
        lambda t: ["--lr", "1e39", "--limit", "16", "--eval-limit", "1"], "in its last step"),
}
BEFORE_A_MODEL = ("folder in use", "nothing to resume")  # for to load one can take minutes


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where the default out/ would be
    flags, expected = BAD[case]
    if case in BEFORE_A_MODEL:
        monkeypatch.setattr(sample, "load_model", None)
    with pytest.raises(SystemExit) as stop:
        sample.run(lambda: upft.main(flags(tmp_path)))
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(error) == 1 and expected in error[0]
    made = list(tmp_path.glob("out/*/*.json*"))
    assert case.startswith("diverging") or not made  # told before any work


def test_quantised_weights_are_refused(tmp_path, monkeypatch):
    """Cast without the scales that lie beside them they would be garbage, without any error."""
    folder = tiny_without(tmp_path, "")
    model = AutoModelForCausalLM.from_pretrained(TINY)
    name, weight = next((k, v) for k, v in model.state_dict().items() if "up_proj" in k)
    scale = weight.abs().max() / 448
    stored = model.state_dict() | {name: (weight / scale).to(torch.float8_e4m3fn),
                                   f"{name}_scale_inv": scale.reshape(1, 1)}
    save_file({k: v.contiguous() for k, v in stored.items() if k != "lm_head.weight"},
              f"{folder}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="its weights are quantised"):
        sample.load_model(folder)
    # Packed in buffers, not parameters: only the library's quantiser tells.
    model.hf_quantizer = "as the library sets it"
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained",
                        lambda *_, **__: (model, {"missing_keys": [], "unexpected_keys": []}))
    with pytest.raises(InputError, match="its weights are quantised"):
        sample.load_model("tiny")


def test_resume_refuses_other_settings(finished):
    with pytest.raises(sample.InputError, match="--resume: prefix differ"):
        run_upft(finished[0], "--prefix", "4", "--resume")


@pytest.mark.parametrize("stop_at", ["sampling", "training"])
def test_resume_refuses_other_weights_or_another_dtype(tmp_path, monkeypatch, stop_at):
    """The model's folder was trained into again; --dtype auto chooses otherwise elsewhere."""
    model = tiny_without(tmp_path, "")
    world = ["--model", model, "--eval-limit", "1"]

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(upft, {"sampling": "stage_cost", "training": "train"}[stop_at], stopped)
        run_upft(tmp_path / "run", *world)
    settings = (tmp_path / "run" / "settings.json").read_text()
    with pytest.raises(InputError, match="--resume: dtype and weights differ"):
        run_upft(tmp_path / "run", *world, "--resume", "--dtype", "bfloat16")
    assert (tmp_path / "run" / "settings.json").read_text() == settings
    other, tokenizer = sample.load_model(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1e-6
    other.save_pretrained(model)
    with pytest.raises(InputError, match="--resume: dtype and weights differ"):
        run_upft(tmp_path / "run", *world, "--resume")


def test_a_run_that_began_while_the_model_was_loaded_is_not_joined(tmp_path, monkeypatch):
    load = sample.load_model

    def slow(*args):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "settings.json").write_text("{}")
        return load(*args)

    monkeypatch.setattr(sample, "load_model", slow)
    with pytest.raises(InputError, match="in use: give another --out, or --resume it"):
        run_upft(tmp_path / "run")


def test_missing_weights_are_told(tmp_path):
    """The library would fill them in at random and only log a warning, which scripts silence."""
    folder = tiny_without(tmp_path, "")
    model = AutoModelForCausalLM.from_pretrained(TINY)
    kept = {f"module.{k}": v for k, v in model.state_dict().items()}  # as some wrappers save them
    model.save_pretrained(folder, state_dict=kept)
    with pytest.raises(InputError, match="its files lack weights: (lm_head|model)"):
        sample.load_model(folder)


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    record = finished[0] / "metrics.json"
    before = record.read_text()
    run_upft(finished[0], "--resume")
    assert record.read_text() == before and "(a resumed run" not in capsys.readouterr().out


def test_resume_refuses_other_questions_under_the_same_name(tmp_path, monkeypatch):
    """Samples are kept by the number of their question: reversed, each would get another's."""
    questions, file = read_jsonl(TINY / "train.jsonl")[:40], tmp_path / "q.jsonl"
    sample.write_jsonl(file, questions)
    flags = ["--data", str(file), "--eval-limit", "1"]
    monkeypatch.setattr(upft, "write_json", stop_after(upft.write_json, "metrics.json"))
    with pytest.raises(KeyboardInterrupt):
        run_upft(tmp_path / "run", *flags)
    monkeypatch.undo()
    sample.write_jsonl(file, questions[::-1])
    with pytest.raises(InputError, match="another set of prompts"):
        run_upft(tmp_path / "run", *flags, "--resume")


def stop_after(write, name):
    """write_json that is interrupted before it writes the file `name`."""
    def stopped(path, value):
        if path.name == name:
            raise KeyboardInterrupt
        write(path, value)
    return stopped


def test_a_model_that_cannot_be_saved_is_one_clear_line(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise Exception("No space left on device")  # as SafetensorError, which is no OSError
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full_disk)
    with pytest.raises(InputError, match="cannot save the model in .*No space left"):
        run_upft(tmp_path / "run", "--limit", "8", "--eval-limit", "1")


def test_a_disk_without_room_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(upft, "disk_usage", lambda folder: argparse.Namespace(free=3_000_000))
    monkeypatch.setattr(upft, "train", None)
    with pytest.raises(InputError, match="no room on the disk"):
        run_upft(tmp_path / "run", "--limit", "8", "--eval-limit", "1")


def test_the_readme_counts_the_lines_of_code():
    """Without comments, docstrings and blank lines."""
    readme = (DATA.parent / "README.md").read_text()
    for name in ("sample.py", "upft.py", "evaluate.py"):
        source = (DATA.parent / name).read_text()
        code = set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.string.strip() and token.type != tokenize.COMMENT:
                code |= set(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                if ast.get_docstring(node) is not None:
                    code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        assert f"| `{name}` | {len(code)} |" in readme


def test_a_home_folder_is_found_for_questions_as_for_the_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "world").symlink_to(TINY)
    args = upft.parse_arguments(["--model=~/world"])
    assert args.data == str(tmp_path / "world/train.jsonl")
    args = upft.parse_arguments(["--out=~/run", "--samples-from=~/samples.jsonl"])
    assert args.out == f"{tmp_path}/run" and args.samples_from == f"{tmp_path}/samples.jsonl"


def test_a_set_with_held_out_questions_is_evaluated_whatever_the_model():
    assert upft.parse_arguments(["--model", "some/model", "--data", "tiny"]).eval_data == "tiny"


def test_sample_script_writes_samples(tmp_path, capsys):
    out = tmp_path / "samples.jsonl"
    sample.main(["--data", "tiny", "--limit", "3", "--n", "2", "--max-new-tokens", "40",
                 "--out", f"{out}/"])
    rows = read_jsonl(out)
    assert [r["sample"] for r in rows] == [0, 1] * 3 and rows[0]["response_ids"]
    with pytest.raises(InputError, match="exists already"):
        sample.main(["--data", "tiny", "--limit", "3", "--out", str(out)])
    with pytest.raises(InputError, match="give --prompt"):
        sample.main(["--data", "", "--out", str(tmp_path / "none.jsonl")])
    sample.main(["--prompt", rows[0]["question"]])
    assert "\\boxed{" in capsys.readouterr().out


def test_the_embedded_sets_are_disjoint_and_large_enough():
    files = [TINY / f"{split}.jsonl" for split in ("train", "dev", "test")]
    sets = [[row["question"] for row in read_jsonl(file)] for file in files]
    assert len(sets[0]) >= 2000 and len(sets[1]) == 500 and len(sets[2]) == 2000
    everything = [q for questions in sets for q in questions]
    assert len(set(everything)) == len(everything)
    assert (TINY / "model.safetensors").stat().st_size <= 8e6


def test_make_tiny_makes_these_questions_and_none_of_the_corpus():
    spec = importlib.util.spec_from_file_location("make_tiny", DATA / "make_tiny.py")
    make_tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_tiny)
    stories, _, questions = make_tiny.make_corpus(random.Random(0), "default", more=100)
    seen = {question.removesuffix(f" {make_tiny.SUFFIX}") for question, _ in stories}
    assert len(seen) == make_tiny.STORIES and make_tiny.SUFFIX == upft.SUFFIX
    for split, rows in questions.items():
        assert split == "more" or rows == read_jsonl(TINY / f"{split}.jsonl")
        for row in rows:
            assert row["question"] not in seen
            seen.add(row["question"])
    assert len(questions["more"]) == 100


def test_the_end_of_turn_is_the_templates_own_token():
    """As with Llama 3, whose first EOS id is not what closes a turn."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    end = sample.end_of_turn(tokenizer)
    assert end == tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|over|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|over|>' }}{% endfor %}"
    over = tokenizer.convert_tokens_to_ids("<|over|>")
    assert sample.end_of_turn(tokenizer) == over != tokenizer.eos_token_id
    model.generation_config.eos_token_id = [3, 4]
    assert sample.stop_ids(model, tokenizer) == {over, tokenizer.eos_token_id, 3, 4}


def test_bfloat16_keeps_the_rotary_frequencies_in_float32():
    """Rounded frequencies would put later positions off by a radian."""
    ours, _ = sample.load_model("tiny", "cpu", "bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    ids = torch.arange(400)[None] % 400
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, plain(ids).logits)
    assert ours.dtype == torch.bfloat16


def test_a_bfloat16_model_read_in_float32_has_no_rounded_buffers(tmp_path):
    """Gemma scales its embeddings by the root of their size, which was a bfloat16 buffer."""
    config = Gemma3TextConfig(vocab_size=1024, hidden_size=40, intermediate_size=64, head_dim=16,
                              num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                              layer_types=["sliding_attention", "full_attention"])
    folder = tiny_without(tmp_path, "model.safetensors")
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    ours, _ = sample.load_model(folder, "cpu", "float32")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, plain(ids).logits)
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float()
    with torch.no_grad():
        assert not torch.equal(rounded(ids).logits, plain(ids).logits)


def test_a_prompt_does_not_depend_on_the_day():
    """Llama 3.2's template writes the date: a run resumed tomorrow would have other prompts."""
    _, tokenizer = sample.load_model("tiny")
    plain = sample.prompt_ids(tokenizer, "How many?")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    ids = sample.prompt_ids(tokenizer, "How many?")
    assert ids == tokenizer("26 Jul 2024").input_ids + plain


def test_another_model_with_the_same_kind_of_template_is_not_the_miniature(tmp_path):
    """ChatML is common, and lr 1e-5 would be ten times too much."""
    plain = (TINY / "chat_template.jinja").read_text().partition("#}")[2]
    assert plain.startswith("{% for message")
    assert not sample.is_tiny(tiny_with_template(tmp_path, plain))


def test_a_model_tuned_from_the_embedded_one_keeps_its_defaults(finished):
    assert sample.is_tiny(finished[0] / "model") and sample.is_tiny("tiny")
    assert not sample.is_tiny("Qwen/Qwen2.5-Math-7B-Instruct")
    sample.main(["--model", str(finished[0] / "model"), "--prompt", "How many?"])


def summary(**changes):
    values = dict(accuracy=0.6, low=0.55, high=0.65, mean_tokens=100.0, cut_off=0.0, no_answer=0.0)
    return values | changes


@pytest.mark.parametrize("tuned, low, words", [
    (summary(), 0.01, "beyond noise"),
    (summary(), -0.01, "within noise"),
    (summary(mean_tokens=9.0), -0.01, "COLLAPSE: answers have shrunk from 100 to 9 tokens"),
    (summary(mean_tokens=9.0, accuracy=0.7), 0.01, "beyond noise"),  # shorter, and right
    (summary(no_answer=0.9), -0.01, "COLLAPSE: many answers"),
    (summary(no_answer=0.15, cut_off=0.15), -0.01, "within noise"),  # the same 15 %, not 30
])
def test_the_verdict_says_noise_and_collapse_in_plain_words(tuned, low, words):
    paired = {"difference": 0.03, "low": low, "high": 0.06, "p": 0.01}
    text = upft.verdict(summary(), tuned, paired)
    assert words in text and ("COLLAPSE" in words or "COLLAPSE" not in text)


def test_a_prompt_with_the_task_template_needs_room_for_a_prefix_only(tmp_path):
    """The longest training prompt with a whole response just fits; the template adds 25 tokens."""
    _, tokenizer = sample.load_model("tiny")
    rows = read_jsonl(DATA / "tiny/train.jsonl")[:40]
    room = 512 - max(len(sample.prompt_ids(tokenizer, row["question"])) for row in rows)
    metrics = run_upft(tmp_path / "run", "--max-new-tokens", str(room), "--eval-data", "")
    assert metrics["examples"] == 40


def test_the_table_and_token_weighting_through_the_command_line(tmp_path, finished, capsys):
    metrics = run_upft(tmp_path / "token", "--weighting", "token")
    shown = capsys.readouterr().out
    for part in ("accuracy", "95 % interval", "difference", "sampled tokens", "tuned tokens",
                 "no answer", "cut off", "seconds: sampling"):
        assert part in shown
    assert f"{metrics['sampled_tokens']:,} sampled tokens" in shown
    assert metrics["train_loss"] != finished[1]["train_loss"]
    assert not same(weights(tmp_path / "token"), weights(finished[0]))


def test_eos_is_trained_on_only_when_asked(tmp_path, finished):
    metrics = run_upft(tmp_path / "eos", "--eos", "--eval-limit", "1")
    assert metrics["tuned_tokens"] == finished[1]["tuned_tokens"] + 36  # one for each prefix


def test_out_of_memory_in_training_says_what_to_do_and_keeps_the_samples(
        tmp_path, monkeypatch, capsys):
    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(upft, "backward", too_large)
    with pytest.raises(SystemExit) as stop:
        sample.run(lambda: run_upft(tmp_path / "run", "--eval-limit", "1"))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "out of memory: lower --micro-batch" in told
    assert "--resume" in told
    monkeypatch.undo()
    assert len(read_jsonl(tmp_path / "run" / "samples.jsonl")) == 40
    run_upft(tmp_path / "run", "--eval-limit", "1", "--micro-batch", "4", "--resume")


def test_samples_from_trains_on_what_was_made_elsewhere(tmp_path, finished, capsys):
    """Our own samples.jsonl gives the same weights; text from elsewhere is cut and closed."""
    folder, ours = tmp_path / "again", finished[0] / "samples.jsonl"
    run_upft(folder, "--samples-from", str(ours), "--eval-limit", "1")
    assert same(weights(folder), weights(finished[0]))
    assert read_jsonl(folder / "samples.jsonl") == read_jsonl(ours)
    assert json.loads((folder / "metrics.json").read_text())["sampled_tokens"] == 0
    run_upft(tmp_path / "short", "--samples-from", str(ours), "--prefix", "4", "--eval-limit", "1")
    for row, short in zip(read_jsonl(ours), read_jsonl(tmp_path / "short" / "samples.jsonl")):
        kept = 4 if row["kind"] == "prefix" else None
        assert short["response_ids"] == row["response_ids"][:kept]
    _, tokenizer = sample.load_model("tiny")
    end, text = sample.end_of_turn(tokenizer), "Let's solve this step by step. 20 + 30 = 50."
    whole = tokenizer(text, add_special_tokens=False).input_ids
    lines = [{"question": "How many?", "completion": text, "kind": "prefix"},
             {"question": "How many?", "completion": text[:16], "kind": "prefix"},
             {"question": "How many?", "kind": "full",
              "completion": [{"role": "assistant", "content": text}]},
             {"question": "How many?", "completion": text, "kind": "full", "finished": False},
             {"question": "How many?", "kind": "full",
              "completion": text + tokenizer.decode([end])},
             {"question": "How many?", "kind": "full", "response_ids": whole[:9]},
             {"question": "How many?", "kind": "prefix", "response_ids": whole}]
    file = tmp_path / "elsewhere.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "text"
    run_upft(folder, "--samples-from", str(file), "--eval-limit", "1")
    rows = read_jsonl(folder / "samples.jsonl")
    assert [r["response_ids"] for r in rows] == [
        whole[:8], whole[:3], whole + [end], whole, whole + [end], whole[:9], whole[:8]]
    assert [r["finished"] for r in rows] == [False, False, True, False, True, False, False]
    assert upft.SUFFIX in rows[0]["prompt"][0]["content"] and rows[2]["prompt"] == rows[3]["prompt"]
    for wrong in ({}, {"completion": ["text"]}, {"response_ids": []},
                  {"completion": [{"role": "assistant", "content": ""}]},
                  {"completion": "\ud800"}, {"completion": text, "question": "\ud800"}):
        file.write_text(json.dumps({"question": "How many?"} | wrong))
        with pytest.raises(InputError, match='line 1: needs "question", and "completion"'):
            run_upft(tmp_path / "bad", "--samples-from", str(file))
    file.write_text(json.dumps(lines[0] | {"kind": "Prefix"}))
    with pytest.raises(InputError, match="""line 1: "kind" is 'Prefix'"""):
        run_upft(tmp_path / "bad", "--samples-from", str(file))
    file.write_text(json.dumps(lines[0] | {"finished": "yes"}))
    with pytest.raises(InputError, match="""line 1: "finished" is 'yes'"""):
        run_upft(tmp_path / "bad", "--samples-from", str(file))
    row = read_jsonl(ours)[0]
    with pytest.raises(InputError, match="its ids or kinds are not those"):
        run_upft(tmp_path / "bad", "--samples-from", str(ours), "--method", "sft")
    for ids, told in ((5, "needs"), ([1.5], "needs"), ([10**6], "its ids or kinds are not")):
        file.write_text(json.dumps(row | {"response_ids": ids}))
        with pytest.raises(InputError, match=told):
            run_upft(tmp_path / "bad", "--samples-from", str(file))
    with pytest.raises(InputError, match="its ids or kinds are not those"):
        run_upft(tmp_path / "bad", "--samples-from", str(ours), "--no-template")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("script", ["upft.py", "sample.py", "evaluate.py", "data/make_tiny.py",
                                    "data/prepare.py", "tests/benchmark.py", "tests/reproduce.py"])
def test_every_script_shows_its_help(script):
    command = [sys.executable, str(DATA.parent / script), "--help"]
    assert "usage:" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
