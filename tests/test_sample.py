"""The sampling loop against the library's own generate, and against the distribution it claims."""

import contextlib
import copy
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import sample
from sample import InputError, generate, left_pad, pick, uniform_stream

SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             tie_word_embeddings=False)  # tied random weights repeat their input; fmt: skip
FAMILIES = {
    "llama": transformers.LlamaConfig(**SMALL),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=16),
    "gemma": transformers.GemmaConfig(**SMALL, head_dim=16),
    # A window of 8 is shorter than the prompts, so sliding layers have something to forget.
    "gemma2": transformers.Gemma2Config(**SMALL, head_dim=16, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=8,
                                            layer_types=["sliding_attention", "full_attention"]),
    "gpt2": transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}


def small_model(family="llama", seed=0):
    """A random model whose greedy output is not one token repeated."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.3)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def ragged_prompts(count=7, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 97, size).tolist() for size in rng.integers(1, 25, count)]


def library_greedy(model, prompt, new, eos=None):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                         do_sample=False, eos_token_id=eos, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("together", [1024, 40])  # 40: the prompts are read in several pieces
def test_greedy_equals_the_library_token_for_token(family, together, monkeypatch):
    monkeypatch.setitem(sample.PREFILL_TOKENS, "cpu", together)
    model, prompts = small_model(family), ragged_prompts()
    ours = generate(model, prompts, max_new_tokens=20)
    theirs = [[library_greedy(model, p, 20)] for p in prompts]
    assert ours == theirs
    # Two samples of one prompt: another path, with a masked column before the prompt.
    assert generate(model, prompts[:1], max_new_tokens=20, n=2) == [theirs[0] * 2]
    assert len({tuple(r[0]) for r in ours}) == len(prompts)  # the outputs do depend on the prompt
    assert len(set(ours[0][0])) > 3


def test_greedy_equals_the_library_with_several_eos_ids():
    model, prompts, new = small_model(), ragged_prompts(12), 100
    free = [r[0] for r in generate(model, prompts, max_new_tokens=new)]
    assert free[2] == library_greedy(model, prompts[2], new)
    eos = [free[0][4], free[1][9]]  # two ids that really occur, in different rows
    ours = generate(model, prompts, max_new_tokens=new, eos_ids=set(eos))
    for prompt, [row] in zip(prompts, ours):
        assert row == library_greedy(model, prompt, new, eos)
    ends = {row[-1] for [row] in ours if len(row) < new}
    assert ends == set(eos)  # both were used, and each is kept in its list
    assert len({len(row) for [row] in ours}) > 2  # rows left the batch at different steps


def test_batch_of_many_equals_one_by_one_even_when_rows_leave():
    model, prompts = small_model("qwen2"), ragged_prompts(15, seed=3)
    settings = dict(max_new_tokens=25, temperature=1.0, n=3, eos_ids=set(range(0, 97, 9)), seed=5)
    whole = generate(model, prompts, **settings)
    single = [generate(model, [p], keys=[i], **settings)[0] for i, p in enumerate(prompts)]
    small = generate(model, prompts, token_budget=100, **settings)
    assert whole == single == small
    assert any(len(s) < 25 for row in whole for s in row)


def without_a_graph(monkeypatch):
    """A CapturedStep that computes its step again, where a GPU would replay it."""
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)

    class Step(sample.CapturedStep):
        def __call__(self, *step):
            super().__call__(*step)
            return self.step()

    return Step


CAPTURED = ["llama", "qwen2", "qwen3", "gemma"]
WAYS = [dict(), dict(temperature=0.9, n=3), dict(temperature=0.9, max_new_tokens=1)]


@pytest.mark.parametrize("family", CAPTURED)
def test_a_captured_step_gives_the_same_tokens(family, monkeypatch):
    """All of a GPU's path but the graph itself: fixed buffers, one mask, half empty batches."""
    model, prompts, steps = small_model(family), ragged_prompts(9), []

    class Watched(without_a_graph(monkeypatch)):
        """A graph would go on with the addresses that it was made with."""

        def __init__(self, model, cache, mask):
            super().__init__(model, cache, mask)
            steps.append(len(mask))
            self.first = self.addresses()

        def addresses(self):
            layers = [b for layer in self.cache.layers for b in (layer.keys, layer.values)]
            buffers = [self.ids, self.position, self.column, self.not_padding, self.columns]
            return [b.data_ptr() for b in buffers + layers]

        def __call__(self, *step):
            logits = super().__call__(*step)
            assert self.addresses() == self.first
            return logits

    monkeypatch.setattr(sample, "CapturedStep", Watched)
    for how in WAYS:
        options = dict(max_new_tokens=40, eos_ids={3, 14, 15, 92, 65}) | how
        monkeypatch.setattr(sample, "can_be_captured", lambda model: False)
        plain = generate(model, prompts, **options)
        assert not steps
        monkeypatch.setattr(sample, "can_be_captured", lambda model: True)
        assert generate(model, prompts, **options) == plain
        rows = len(prompts) * how.get("n", 1)
        if options["max_new_tokens"] > 1:  # made again where half of the rows were done, not sooner
            assert steps[0] == rows and all(2 * b <= a for a, b in zip(steps, steps[1:]))
            assert len(steps) > 1 or not how
        steps.clear()


PACKED = [torch.float32] * torch.backends.mkldnn.is_available()
if PACKED and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    PACKED += [torch.bfloat16]


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])  # qwen2's have a bias
def test_packed_weights_give_the_same_tokens_and_go(family, dtype, monkeypatch):
    model, prompts = small_model(family).to(dtype), ragged_prompts(9)
    assert not sample.can_be_packed(model)  # too small to gain anything
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear]
    options = dict(max_new_tokens=20, temperature=0.9, n=2, eos_ids={3, 14})
    packed = lambda: [layer for layer in layers if "forward" in vars(layer)]
    for _ in range(2):  # the second time with other weights
        plain = generate(model, prompts, **options)
        with monkeypatch.context() as patch:
            patch.setattr(sample, "can_be_packed", lambda model: True)
            with sample.packed_weights(model):
                assert packed() == layers != []
            seen = []
            assert generate(model, prompts, on_done=lambda *_: seen.append(len(packed())),
                            **options) == plain
            assert set(seen) == {len(layers)} and not packed()
            with pytest.raises(KeyboardInterrupt), sample.packed_weights(model):
                raise KeyboardInterrupt
            assert not packed()
            with sample.packed_weights(model), sample.packed_weights(model):
                pass  # the inner one finds nothing to pack
            assert not packed()
        for layer in layers:
            layer.weight.data.mul_(-1)


def test_which_models_are_packed():
    def model(gigabytes, device="cpu", dtype=torch.float32):
        weights = [SimpleNamespace(nbytes=gigabytes * 1e9)]
        return SimpleNamespace(device=torch.device(device), dtype=dtype, parameters=lambda: weights)

    assert sample.can_be_packed(model(1)) == torch.backends.mkldnn.is_available()
    others = model(0.01), model(9), model(1, "meta"), model(1, dtype=torch.float64)
    assert not any(map(sample.can_be_packed, others))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph needs a GPU")
@pytest.mark.parametrize("family", CAPTURED)
def test_a_graph_gives_the_same_tokens(family, monkeypatch):
    model, prompts = small_model(family).cuda(), ragged_prompts(9)
    sample.fuse_norms(model)
    for how in WAYS:  # a budget for several batches one after the other
        options = dict(max_new_tokens=40, eos_ids={3, 14, 15, 92, 65}, token_budget=300) | how
        captured = generate(model, prompts, **options)
        with monkeypatch.context() as without:
            without.setattr(sample, "can_be_captured", lambda model: False)
            assert generate(model, prompts, **options) == captured


@pytest.mark.parametrize("family, norms",
                         dict(llama=5, qwen2=5, qwen3=9, gemma=0, gpt2=0, cohere=0).items())
def test_fused_norms_compute_what_the_library_does(family, norms, monkeypatch):
    # Cohere's LayerNorm has a variance_epsilon as well, and subtracts the mean.
    monkeypatch.setitem(FAMILIES, "cohere", transformers.CohereConfig(**SMALL))
    model = small_model(family)
    for parameter in model.parameters():  # else every norm's weight is 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    fused = copy.deepcopy(model)
    sample.fuse_norms(fused)
    assert sum("forward" in vars(module) for module in fused.modules()) == norms
    twin = copy.deepcopy(fused)  # a copy has to go on with its own weights
    for parameter in fused.parameters():
        parameter.data.zero_()
    ids, grads = torch.randint(1, 97, (3, 9)), []
    for m in (model, twin):
        grads.append(torch.autograd.grad(m(ids).logits.logsumexp(-1).sum(), m.parameters()))
    assert torch.allclose(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*grads))
    assert generate(twin, ragged_prompts(), max_new_tokens=20) == generate(
        model, ragged_prompts(), max_new_tokens=20)


def test_norms_are_fused_on_a_gpu_only():
    model, _ = sample.load_model("tiny")
    fused = any("forward" in vars(module) for module in model.modules())
    assert fused == (model.device.type == "cuda")


def test_a_captured_step_gives_the_same_logits_in_bfloat16(monkeypatch):
    """Here on a CPU without a graph: mask, cache and fused norms are those of the graph."""
    Step = without_a_graph(monkeypatch)
    model, prompts = small_model("qwen2").bfloat16(), ragged_prompts(6)
    sample.fuse_norms(model)
    steps = []
    with torch.inference_mode():
        for captured in (False, True):
            mask = sample.left_pad(prompts)[1]
            columns = mask.shape[1]
            logits, cache = sample.prefill(model, prompts, torch.arange(6), columns, 3)
            tokens, position = logits.argmax(-1), mask.sum(-1)
            mask = torch.nn.functional.pad(mask, (0, 3), value=1)
            if captured:
                steps.append(Step(model, cache, mask)(tokens, position, columns))
            else:
                steps.append(sample.next_logits(model, tokens[:, None], mask[:, : columns + 1],
                                                position[:, None], cache))
    plain, with_graph = (x.float() for x in steps)
    assert (plain - with_graph).norm() < 0.02 * plain.norm()


def test_rows_that_are_done_are_replaced_by_live_ones_from_the_end():
    layer = sample.KVLayer()
    layer.keys = torch.arange(5.0)[:, None, None, None].expand(5, 1, 2, 1).clone()
    layer.values = layer.keys + 10
    names = torch.arange(5)
    (left,) = sample.leave({1, 4}, 3, SimpleNamespace(layers=[layer]), [names])
    assert left.tolist() == [0, 3, 2] and len(layer.keys) == 3
    assert layer.keys[:3, 0, 0, 0].tolist() == [0, 3, 2]
    assert layer.values[:3, 0, 1, 0].tolist() == [10, 13, 12]


def test_decode_leaves_the_uniforms_of_its_caller_alone():
    uniforms = np.random.default_rng(0).random((12, 20))
    before, options = uniforms.copy(), dict(max_new_tokens=20, temperature=1.0, top_p=1.0)
    list(sample.decode(small_model(), ragged_prompts(12), [1] * 12, uniforms,
                       eos_ids=set(range(20)), **options))
    assert (uniforms == before).all()


def test_only_models_that_a_graph_fits_are_captured(monkeypatch):
    rotary = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    longer = lambda kind: transformers.LlamaConfig(**SMALL, rope_parameters=rotary | {
        "rope_type": kind, "low_freq_factor": 1.0, "high_freq_factor": 4.0})
    fits = {name: FAMILIES[name] for name in ("llama", "qwen2", "qwen3", "gemma")}
    fits |= {kind: longer(kind) for kind in ("llama3", "yarn", "linear")}
    others = {name: FAMILIES[name] for name in ("gemma2", "gemma3", "gpt2")}
    others |= {
        "dynamic": longer("dynamic"),  # its frequencies depend on the length
        "window": transformers.MistralConfig(**SMALL, sliding_window=8),
        "layers": transformers.Qwen3Config(**SMALL, head_dim=16, layer_types=[
            "full_attention", "sliding_attention"]),
        "alibi": transformers.FalconConfig(**SMALL, alibi=True),
        "experts": transformers.Qwen3MoeConfig(**SMALL, moe_intermediate_size=32, num_experts=4),
    }
    for name, config in (fits | others).items():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # it is changed below
        assert not sample.can_be_captured(model)  # on a CPU
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        assert sample.can_be_captured(model) == (name in fits), name
        model.set_attn_implementation("eager")  # it would add a mask of booleans
        assert not sample.can_be_captured(model)
        monkeypatch.undo()


def test_pad_equal_to_eos_does_no_harm(monkeypatch):
    model, prompts = small_model(), ragged_prompts(9)
    eos = generate(model, prompts, max_new_tokens=12)[0][0][6]
    prompts = [p + [eos] + p for p in prompts]  # the EOS also occurs inside prompts
    expected = generate(model, prompts, max_new_tokens=12, eos_ids={eos})

    def padded_with_eos(rows):
        ids, mask = left_pad(rows)
        return ids.masked_fill(mask == 0, eos), mask

    monkeypatch.setattr(sample, "left_pad", padded_with_eos)
    assert generate(model, prompts, max_new_tokens=12, eos_ids={eos}) == expected


def test_seed_key_and_sample_number_make_the_stream():
    streams = [uniform_stream(*a, 4).tolist() for a in [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3)]]
    assert len({tuple(s) for s in streams}) == 4
    assert uniform_stream(0, 1, 2, 100)[:4].tolist() == streams[0]  # longer: the same beginning
    model, prompts = small_model(), ragged_prompts(5)
    draw = lambda seed: generate(model, prompts, max_new_tokens=8, temperature=1.0, seed=seed)
    assert draw(1) == draw(1) != draw(2)


def chi_square(counts, expected):
    """Statistic over the cells with at least 5 expected, the rest pooled; and its degrees."""
    big = expected >= 5
    cells = [np.append(x[big], x[~big].sum()) for x in (counts, expected)]
    keep = cells[1] > 0
    return ((cells[0] - cells[1]) ** 2 / np.maximum(cells[1], 1e-9))[keep].sum(), keep.sum() - 1


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7)])
def test_sampling_frequencies_match_the_softmax(temperature, top_p):
    model, prompt, n = small_model(), [3, 1, 4, 1, 5], 4000
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    p = torch.softmax(logits / temperature, -1).numpy()
    if top_p < 1:
        order = np.argsort(-p)
        kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
        p = np.where(np.isin(np.arange(len(p)), kept), p, 0) / p[kept].sum()
    settings = dict(max_new_tokens=1, temperature=temperature, top_p=top_p, n=n, seed=2)
    first = [s[0] for s in generate(model, [prompt], **settings)[0]]
    statistic, degrees = chi_square(np.bincount(first, minlength=97), n * p)
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5  # about four standard deviations
    assert statistic > degrees - 4 * (2 * degrees) ** 0.5  # nor suspiciously even: independent
    assert first == [s[0] for s in generate(model, [prompt], token_budget=700, **settings)[0]]


def test_inverse_cdf_against_float64_and_at_its_edges():
    torch.manual_seed(0)
    logits = torch.randn(500, 1003) * 3
    uniforms = torch.rand(500, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    cdf = torch.softmax(logits, -1).double().cumsum(-1)
    naive = (cdf / cdf[:, -1:] <= uniforms[:, None]).sum(-1)
    assert (pick(logits, uniforms, 1.0) == naive).float().mean() > 0.995  # ties in rounding
    for place in (0, 3, 7, 9):  # no token of probability 0 is ever drawn
        spike = torch.full((1, 10), -1e9)
        spike[0, place] = 0.0
        for u in (0.0, 0.5, 1 - 2**-53):
            assert pick(spike, torch.tensor([u], dtype=torch.float64), 1.0).item() == place
    logits[:, 500:] = -torch.inf  # whole blocks of them at the end
    assert (pick(logits, torch.full((500,), 1 - 2**-53, dtype=torch.float64), 1.0) < 500).all()


def test_prompts_read_in_pieces_and_in_any_order_give_the_same_samples(monkeypatch):
    model, prompts = small_model("qwen2"), ragged_prompts(9)
    draw = lambda: sample.generate(model, prompts, max_new_tokens=12, temperature=1.0, n=3)
    whole, calls = draw(), []
    monkeypatch.setitem(sample.PREFILL_TOKENS, "cpu", 30)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **k: calls.append(ids.shape) or forward(
        ids, **k))  # fmt: skip
    assert draw() == whole
    pieces = [shape for shape in calls if shape[1] > 1]
    assert len(pieces) > 3 and all(rows == 1 or rows * width <= 30 for rows, width in pieces)
    shuffled = prompts[::-1]  # decode() is not told to sort
    read = lambda: sample.prefill(model, shuffled, torch.arange(9), max(map(len, prompts)), 1)[0]
    logits = read()
    monkeypatch.setitem(sample.PREFILL_TOKENS, "cpu", 10**6)
    torch.testing.assert_close(logits, read())


def test_samples_of_one_prompt_always_have_something_to_mask(monkeypatch):
    """With nothing to mask the library takes a kernel that is many times slower on a CPU."""
    model, masks = small_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, attention_mask, **k: masks.append(
        attention_mask) or forward(ids, attention_mask=attention_mask, **k))
    generate(model, [[3, 1, 4, 1, 5]], max_new_tokens=4, temperature=1.0, n=3)
    assert [m.shape for m in masks] == [(1, 5), (3, 7), (3, 8), (3, 9)]  # 5 + masked + new ones
    assert all((m[:, 0] == 0).all() and (m[:, 1:] == 1).all() for m in masks[1:])


def test_greedy_takes_the_first_of_equal_logits_as_argmax_does():
    torch.manual_seed(0)
    logits = torch.randn(3000, 1003).bfloat16()  # 8 bits: the largest often occurs twice
    ties = (logits == logits.amax(-1, keepdim=True)).sum(-1)
    assert (ties > 1).sum() > 10
    assert torch.equal(pick(logits, None, 0.0), logits.float().argmax(-1))


def test_samples_of_a_prompt_share_one_prefill():
    model, prompts = small_model(), ragged_prompts(6)
    seen = []
    forward = model.forward
    model.forward = lambda ids, **kw: (seen.append(ids.numel()), forward(ids, **kw))[1]
    generate(model, prompts, max_new_tokens=1, temperature=1.0, n=16)
    width = max(map(len, prompts))
    assert seen == [6 * width]  # not 16 times that


def test_prefix_needs_t_forward_passes_and_one_logit_column():
    model, seen = small_model(), []
    forward = model.forward
    def spy(ids, **kw):
        out = forward(ids, **kw)
        seen.append(out.logits.shape[1])
        return out
    model.forward = spy
    generate(model, ragged_prompts(4), max_new_tokens=8)
    assert seen == [1] * 8  # prefill + 7 steps, each with the logits of one column


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")])
def test_out_of_memory_halves_the_budget_and_loses_nothing(capsys, error):
    model, prompts = small_model(), ragged_prompts(10)
    expected = generate(model, prompts, max_new_tokens=10)
    forward, finished = model.forward, []
    def limited(ids, **kw):
        if ids.shape[0] > 3:
            raise error
        return forward(ids, **kw)
    model.forward = limited
    done = lambda i, j, ids: finished.append(i)
    assert generate(model, prompts, max_new_tokens=10, on_done=done) == expected
    assert sorted(finished) == list(range(10))
    lowered = re.findall(r"--token-budget (\d+)", capsys.readouterr().err)
    longest = max(map(len, prompts)) + 10  # ten rows, five, and then two at a time
    assert list(map(int, lowered))[:2] == [5 * longest, 5 * longest // 2]


def test_out_of_memory_with_one_sequence_is_one_clear_line(monkeypatch, capsys):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(sample, "decode", too_large)
    with pytest.raises(SystemExit) as stop:
        sample.run(lambda: generate(small_model(), ragged_prompts(4), max_new_tokens=10))
    *halvings, last = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and last.startswith("error: out of memory: lower")
    assert halvings and all("going on with --token-budget" in line for line in halvings)


def test_a_prompt_longer_than_the_context_is_named():
    with pytest.raises(InputError, match="prompt 2 has 120 tokens.*context of 128"):
        generate(small_model(), [[1], [1] * 120], max_new_tokens=20)


def test_the_context_of_a_rope_that_changes_with_length_is_the_shorter_one():
    """Phi-3's frequencies depend on the longest row of the batch, so on the company it keeps."""
    rope = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    config = transformers.Phi3Config(**SMALL, pad_token_id=0, rope_parameters=rope,
                                     original_max_position_embeddings=32)
    model = AutoModelForCausalLM.from_config(config)
    sample.check_length(model, [[1] * 20], 12)
    with pytest.raises(InputError, match="context of 32"):
        sample.check_length(model, [[1] * 20], 13)


def test_a_model_without_a_cache_is_refused():
    config = transformers.OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(InputError, match="OpenAIGPTLMHeadModel keeps no keys and values"):
        generate(AutoModelForCausalLM.from_config(config), [[1, 2]], max_new_tokens=2)


def test_left_pad_literal_example():
    ids, mask = left_pad([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_no_argument_of_the_library_is_used_that_it_is_about_to_drop():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # 5.24: past_key_values became cache
        generate(small_model(), ragged_prompts(3), max_new_tokens=3)
