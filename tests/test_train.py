"""The loss and the update against independent computations on tiny models."""

import argparse

import numpy as np
import pytest
import torch

import sample
import upft
from tests.test_sample import FAMILIES, small_model
from upft import SplitAdamW, backward, batches, choose_kinds, make_examples, micro_batches


def some_examples(count=7, seed=0):
    """Examples of uneven length: prefixes of up to 8 tokens and two full traces."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(1, 97, rng.integers(low, high)).tolist()
    return [
        {"prompt": draw(3, 20), "response": draw(20, 40) if i < 2 else draw(1, 9),
         "kind": "full" if i < 2 else "prefix"}
        for i in range(count)
    ]


def reference_loss(model, examples, weighting):
    """The same loss without padding, batching or chunks, from the model's own logits."""
    losses = []
    for e in examples:
        ids = torch.tensor([e["prompt"] + e["response"]])
        log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        nll = -log_p[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        losses.append(nll[len(e["prompt"]) - 1 :])  # only what predicts the response
    if weighting == "token":
        return torch.cat(losses).mean()
    return torch.stack([nll.mean() for nll in losses]).mean()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_equal_an_independent_computation(family):
    model, examples = small_model(family), some_examples()
    for weighting in ("example", "token"):
        model.zero_grad()
        expected = reference_loss(model, examples, weighting)
        expected.backward()
        reference = gradients(model)
        for micro_batch in (1, 3, 100):  # the same for any micro-batch size
            model.zero_grad()
            loss = backward(model, examples, micro_batch, weighting)
            assert loss == pytest.approx(expected.item(), rel=1e-5)
            assert gradients(model).keys() == reference.keys()
            for name, grad in gradients(model).items():
                scale = reference[name].abs().max()
                torch.testing.assert_close(grad, reference[name], rtol=1e-3, atol=1e-4 * scale)
    upft.check_head(model, [5, 6, 7, 8])


def test_gradient_checkpointing_and_chunks_change_nothing(monkeypatch):
    model, examples = small_model("qwen2"), some_examples()
    loss = backward(model, examples, 4, "example")
    plain = gradients(model)
    model.zero_grad()
    model.train()
    upft.enable_checkpointing(model)
    whole = upft.response_nll
    monkeypatch.setattr(upft, "response_nll", lambda m, e: whole(m, e, chunk=5))
    assert backward(model, examples, 4, "example") == pytest.approx(loss, rel=1e-6)
    assert gradients(model).keys() == plain.keys() == {n for n, _ in model.named_parameters()}
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-4, atol=1e-7)


def test_a_model_that_cannot_recompute_is_told_what_to_do():
    model = small_model("qwen2")
    model.supports_gradient_checkpointing = False
    with pytest.raises(sample.InputError, match="--no-checkpointing"):
        upft.enable_checkpointing(model)


def test_each_example_weighs_the_same_and_token_weighting_does_not():
    examples = [{"prompt": [1], "response": [2] * 300, "kind": "full"}]
    examples += [{"prompt": [1], "response": [2] * 8, "kind": "prefix"} for _ in range(9)]
    by_example = upft.token_weights(examples, examples, "example")
    assert by_example.sum() == pytest.approx(1) and by_example[:300].sum() == pytest.approx(0.1)
    by_token = upft.token_weights(examples, examples, "token")
    assert by_token.sum() == pytest.approx(1) and by_token[:300].sum() == pytest.approx(300 / 372)


def test_prompt_tokens_carry_no_loss():
    """Only logits at the positions that predict response tokens receive a gradient."""
    model, [example] = small_model(), some_examples(1)
    kept = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: (out.retain_grad(), kept.append(out))[0])
    upft.response_nll(model, [example]).sum().backward()
    assert kept[0].shape == (len(example["response"]), 97)  # no logits were made for the prompt
    assert (kept[0].grad.abs().sum(-1) > 0).all()


def test_prefix_examples_compute_logits_for_t_columns_only():
    model, seen = small_model(), []
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(len(out)))
    examples = [{"prompt": [5] * 60, "response": [7] * 8, "kind": "prefix"} for _ in range(4)]
    backward(model, examples, 4, "example")
    assert seen == [4 * 8]  # not 4 * 68


def test_micro_batches_never_mix_and_keep_every_example():
    examples = some_examples(40) + some_examples(30, seed=1)
    for size in (1, 4, 64):
        pieces = micro_batches(examples, size)
        assert all(len({e["kind"] for e in piece}) == 1 and len(piece) <= size for piece in pieces)
        assert sorted(id(e) for p in pieces for e in p) == sorted(map(id, examples))
    columns = lambda size: sum(len(piece) * max(map(upft.length, piece))
                               for piece in micro_batches(examples, size))
    real = sum(map(upft.length, examples))
    assert columns(4) < 1.1 * real < columns(64)  # alike in length: little padding


def test_structure_share_is_exact_random_and_reproducible():
    kinds = choose_kinds(1000, 0.1, seed=3)
    assert kinds.count("full") == 100 and kinds == choose_kinds(1000, 0.1, seed=3)
    assert kinds != choose_kinds(1000, 0.1, seed=4)
    assert "full" in kinds[500:]  # not the first rows in file order
    assert choose_kinds(9, 0, 0) == ["prefix"] * 9 and choose_kinds(9, 1, 0) == ["full"] * 9


def test_batches_are_a_function_of_the_whole_run():
    plan = batches(10, 4, epochs=2, seed=0)
    assert [len(b) for b in plan] == [4, 4, 2] * 2
    for epoch in (plan[:3], plan[3:]):
        assert sorted(np.concatenate(epoch)) == list(range(10))
    assert not np.array_equal(plan[0], plan[3])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_traces_are_spread_over_the_whole_run(seed):
    """Both draws once came from one stream, and the first batches were nothing but full traces."""
    kinds = choose_kinds(1000, 0.1, seed)
    shares = [np.mean([kinds[i] == "full" for i in b]) for b in batches(1000, 100, 2, seed)]
    assert 0.01 < min(shares) and max(shares) < 0.25


def test_an_eos_is_added_once_and_never_to_a_cut_off_trace():
    row = lambda kind, ids: {"prompt_ids": [1], "response_ids": ids, "kind": kind,
                             "finished": ids[-1] == 9}
    rows = [row("prefix", [3, 4]), row("prefix", [3, 9]), row("full", [3, 4]), row("full", [5, 9])]
    responses = lambda eos: [e["response"] for e in make_examples(rows, 9, eos)]
    assert responses(True) == [[3, 4, 9], [3, 9], [3, 4], [5, 9]]
    assert responses(False) == [[3, 4], [3, 9], [3, 4], [5, 9]]


def test_split_and_join_are_exact():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(20000) * 10.0**e for e in (-6, -2, 0, 4)] + [torch.zeros(3)])
    weight, lost = SplitAdamW.split(x)
    assert weight.dtype == torch.bfloat16 and lost.dtype == torch.int16
    assert torch.equal(SplitAdamW.join(weight, lost), x)
    nearest = x.bfloat16()  # ours rounds ties away from zero, the library to even: both nearest
    assert torch.equal((weight.float() - x).abs(), (nearest.float() - x).abs())


def train_in(dtype, optimizer_of, steps=60, lr=1e-6):
    """Train a copy of one bfloat16 model; returns how far its weights moved, as one vector."""
    model = small_model("qwen2", seed=1).bfloat16()  # all start from the same bfloat16 weights
    start = torch.cat([p.detach().double().view(-1) for p in model.parameters()])
    model = model.to(dtype)
    optimizer = optimizer_of(list(model.parameters()))
    for step in range(steps):
        backward(model, some_examples(8, seed=step % 5), 8, "example")
        optimizer.step(lr)
        model.zero_grad()
    if isinstance(optimizer, SplitAdamW):
        pairs = zip(model.parameters(), optimizer.lost)
        end = [SplitAdamW.join(p.detach().view(-1), lost) for p, lost in pairs]
    else:
        end = [p.detach().view(-1) for p in model.parameters()]
    return torch.cat([e.double() for e in end]) - start


class NaiveAdamW(torch.optim.AdamW):
    """What everybody writes first: AdamW on the bfloat16 weights themselves."""

    def __init__(self, parameters):
        super().__init__(parameters, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, lr):
        self.param_groups[0]["lr"] = lr
        super().step()


def test_bfloat16_training_tracks_float32_and_naive_bfloat16_does_not():
    exact = train_in(torch.float32, upft.Float32AdamW)
    ours = train_in(torch.bfloat16, SplitAdamW)
    naive = train_in(torch.bfloat16, NaiveAdamW)
    cosine = lambda a, b: (a @ b / (a.norm() * b.norm())).item()
    assert cosine(ours, exact) > 0.97
    assert 0.95 < (ours.norm() / exact.norm()).item() < 1.05
    assert (naive != 0).double().mean() < 0.2 < 0.9 < (ours != 0).double().mean()
    assert cosine(naive, exact) < 0.5


def test_the_fused_float32_update_equals_adam_written_out():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50))
    w, m, v = weight.detach().double(), 0.0, 0.0
    optimizer = upft.Float32AdamW([weight])
    for step in range(1, 6):
        weight.grad = torch.randn(50)
        m = 0.9 * m + 0.1 * weight.grad.double()
        v = 0.95 * v + 0.05 * weight.grad.double() ** 2
        w = w - 1e-3 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        optimizer.step(1e-3)
    torch.testing.assert_close(weight.detach().double(), w, rtol=1e-5, atol=1e-6)


def settings(**changes):
    """The arguments that train() reads."""
    defaults = dict(batch_size=4, micro_batch=2, epochs=2, seed=0, warmup=0.03, lr=1e-3, clip=1.0,
                    weighting="example", save_every=2, resume=False, checkpointing=True)
    return argparse.Namespace(**(defaults | changes))


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2 has dropout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
        tmp_path, monkeypatch, dtype, family):
    examples = some_examples(14)
    whole, stopped = small_model(family).to(dtype), small_model(family).to(dtype)
    losses = upft.train(whole, examples, settings(save_every=0), tmp_path)
    assert len(losses) == 8
    counted, calls = upft.backward, []

    def stop_in_step_6(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return counted(*args)

    monkeypatch.setattr(upft, "backward", stop_in_step_6)
    with pytest.raises(KeyboardInterrupt):
        upft.train(stopped, examples, settings(), tmp_path)
    fresh = small_model(family, seed=9).to(dtype)  # all must come from the checkpoint
    assert upft.train(fresh, examples, settings(resume=True), tmp_path) == losses
    assert len(calls) == 6 + 4  # steps 5 to 8 only
    assert not fresh.training
    for (name, a), b in zip(whole.state_dict().items(), fresh.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_run_of_one_step_moves_the_weights(tmp_path):
    model, before = small_model(), small_model()
    upft.train(model, some_examples(4), settings(epochs=1, lr=1e-4), tmp_path)
    moved = max((a - b).abs().max().item() for a, b in zip(model.parameters(), before.parameters()))
    assert moved == pytest.approx(1e-4, rel=0.01)  # Adam's first step is lr in every coordinate


def test_warm_up_and_clipping(tmp_path, monkeypatch):
    rates, norms = [], []
    step = upft.Float32AdamW.step
    def spy(self, lr):
        rates.append(lr)
        grads = [p.grad.norm() ** 2 for g in self.param_groups for p in g["params"]]
        norms.append(sum(grads).item() ** 0.5)
        step(self, lr)
    monkeypatch.setattr(upft.Float32AdamW, "step", spy)
    args = settings(epochs=4, warmup=0.25, lr=1e-5, clip=0.01)
    upft.train(small_model(), some_examples(14), args, tmp_path)
    assert np.allclose(rates, [2.5e-6, 5e-6, 7.5e-6] + [1e-5] * 13)
    assert max(norms) < 0.0101


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = small_model()
    model.get_output_embeddings().weight.data[5] = float("nan")
    with pytest.raises(sample.InputError, match="step 1: loss nan.*--lr"):
        upft.train(model, some_examples(4), settings(), tmp_path)


def test_a_head_that_is_wrong_on_some_tokens_only_is_refused(monkeypatch):
    """The last token of a chat prompt is so sure that any scale of the logits fits it."""
    model, ids, right = small_model(), [5, 6, 7, 8, 9], upft.head_nll
    upft.check_head(model, ids)
    wrong = torch.tensor([2.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(upft, "head_nll", lambda *args: right(*args) * wrong)
    with pytest.raises(sample.InputError, match="head_nll.*LlamaForCausalLM"):
        upft.check_head(model, ids)


def test_training_leaves_the_attention_of_cudnn_alone(monkeypatch):
    """Also where checkpointing computes a layer again, and only there."""
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*inputs, **options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*inputs, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model, before = small_model("llama"), torch.backends.cuda.cudnn_sdp_enabled()
    upft.enable_checkpointing(model)
    backward(model.train(), some_examples(2), 2, "example")
    assert seen == [False] * 4  # two layers, forward and again
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
