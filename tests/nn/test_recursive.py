"""Tied layers, matrices of depths, and the ordinary model that they equal."""

import copy

import pytest
import torch
import torch.nn.functional as F
from recursive_models import KINDS, WINDOW, logits, tiny, tokens
from torch import nn

from gemma_ext.nn.recursive import (
    DepthLinear,
    Plan,
    decoder_layers,
    linear_names,
    make_recursive,
    merged,
)


def relaxed(kind: str, rank: int = 3, plan: Plan | None = None, seed: int = 0):
    """A recursive model with random matrices."""
    model = tiny(kind, seed=seed)
    names = linear_names(decoder_layers(model)[1][0])
    plan = plan or Plan.of(6, 2, ranks={name: rank for name in names if rank})
    make_recursive(model, plan)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("rank", [1, 5, 100])
def test_depth_linear_is_its_formula(rank):
    weight = nn.Parameter(torch.randn(7, 9, dtype=torch.float64))
    bias = nn.Parameter(torch.randn(7, dtype=torch.float64))
    made = DepthLinear(weight, bias, rank)
    assert made.rank == min(rank, 7)
    assert (made.in_features, made.out_features) == (9, 7)
    assert f"rank={made.rank}" in repr(made)
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    assert torch.equal(made(x), F.linear(x, weight, bias))
    assert torch.equal(made.merged_weight(), weight.detach())
    nn.init.normal_(made.lora_B)
    expected = F.linear(x, weight + made.lora_B @ made.lora_A, bias)
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.merged_weight(), weight + made.lora_B @ made.lora_A)


def test_low_precision_merges_in_float32():
    weight = nn.Parameter(torch.randn(5, 6).bfloat16())
    made = DepthLinear(weight, None, 4)
    nn.init.normal_(made.lora_B)
    wide = weight.float() + made.lora_B.float() @ made.lora_A.float()
    assert torch.equal(made.merged_weight(), wide.bfloat16())


def test_rank_of_zero_is_refused():
    with pytest.raises(ValueError, match="rank: expected a number >= 1, got 0"):
        DepthLinear(nn.Parameter(torch.zeros(2, 2)), None, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_depths_share_parameters_and_nothing_else(kind):
    model = relaxed(kind)
    _, layers = decoder_layers(model)
    for depth in range(3):
        one, two = (dict(layers[d].named_parameters()) for d in (depth, depth + 3))
        assert one.keys() == two.keys()
        for name in one:
            assert (one[name] is two[name]) == (".lora_" not in name), name
    attention = [getattr(x, "self_attn", None) or x.attention for x in layers]
    assert [a.layer_idx for a in attention] == list(range(6))
    lone = sum(p.numel() for p in tiny(kind).parameters())
    stored = sum(p.numel() for p in layers[0].parameters()) - sum(
        p.numel() for n, p in layers[0].named_parameters() if ".lora_" in n
    )
    low = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert sum(p.numel() for p in model.parameters()) == lone - 3 * stored + low


@pytest.mark.parametrize("order", ["cycle", "middle-cycle", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_the_runtime(kind, order):
    names = linear_names(decoder_layers(tiny(kind))[1][0])
    plan = Plan.of(6, 2, order, ranks=dict.fromkeys(names, 3))
    model = relaxed(kind, plan=plan)
    ids = tokens(3 * WINDOW)
    made = merged(model)
    assert getattr(made.config, "recursive", None) is None
    assert type(made) is type(model)
    storages = {p.data_ptr() for p in made.parameters()}
    assert len(storages) == len(list(made.parameters()))
    assert not storages & {p.data_ptr() for p in model.parameters()}
    # the eager attention of transformers takes its softmax in float32
    torch.testing.assert_close(logits(made, ids), logits(model, ids), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_without_matrices_merged_is_the_same_to_the_bit(kind):
    model = relaxed(kind, 0)
    assert not any(isinstance(m, DepthLinear) for m in model.modules())
    assert torch.equal(logits(merged(model), tokens()), logits(model, tokens()))


def test_attention_type_belongs_to_the_depth():
    """Gemma 2 alternates windows: with three stored layers each one is sliding once, full once."""
    model = relaxed("gemma2", 0)
    types = [layer.self_attn.layer_type for layer in model.model.layers]
    assert types == ["sliding_attention", "full_attention"] * 3
    ids = tokens(3 * WINDOW)
    truth = logits(merged(model), ids)
    assert torch.equal(logits(model, ids), truth)
    trap = copy.deepcopy(model)
    trap.config.layer_types = types[:3] * 2
    for layer, kind in zip(trap.model.layers, types[:3] * 2, strict=True):
        layer.self_attn.layer_type = kind
        layer.self_attn.sliding_window = WINDOW if kind == "sliding_attention" else None
    assert (logits(trap, ids) - truth).abs().max() > 1e-3
    short = ids[:, :WINDOW]
    torch.testing.assert_close(logits(trap, short), logits(model, short), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "pythia"])
def test_caches_and_generation_are_those_of_the_merged_model(kind):
    model = relaxed(kind)
    ids = tokens(5)
    options = {"max_new_tokens": 3 * WINDOW, "do_sample": False, "pad_token_id": 0}
    made = model.generate(ids, **options)
    assert torch.equal(made, merged(model).generate(ids, **options))
    assert torch.equal(made, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("kind", ["gemma2", "qwen2", "pythia"])
def test_gradient_of_a_tied_weight_is_the_sum_over_depths(kind):
    model = relaxed(kind)
    untied = merged(relaxed(kind, 0))
    zero = relaxed(kind, 0)
    ids = tokens()
    for one in (zero, untied):
        one.train()
        F.cross_entropy(one(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    _, tied = decoder_layers(zero)
    _, own = decoder_layers(untied)
    for depth in range(3):
        parts = [dict(own[d].named_parameters()) for d in (depth, depth + 3)]
        for name, parameter in tied[depth].named_parameters():
            total = parts[0][name].grad + parts[1][name].grad
            torch.testing.assert_close(parameter.grad, total, rtol=1e-9, atol=1e-12)
    assert model.config.recursive["loops"] == 2


def test_one_hot_concatenation_equals_the_matrices_of_the_depths():
    weight = nn.Parameter(torch.randn(11, 7, dtype=torch.float64))
    depths = [DepthLinear(weight, None, 3) for _ in range(4)]
    for part in depths:
        nn.init.normal_(part.lora_B)
    loop = torch.randint(4, (20,))
    x = torch.randn(20, 7, dtype=torch.float64)
    segmented = torch.stack([depths[j](row) for j, row in zip(loop.tolist(), x, strict=True)])
    low = x @ torch.cat([part.lora_A for part in depths]).mT
    mask = F.one_hot(loop, 4).repeat_interleave(3, 1)
    joined = x @ weight.mT + (low * mask) @ torch.cat([part.lora_B for part in depths], 1).mT
    torch.testing.assert_close(joined, segmented, rtol=0, atol=1e-12)


def test_what_cannot_be_tied_is_refused():
    model = tiny("gemma2")
    with pytest.raises(ValueError, match="plan: expected 6 layers, got 4"):
        make_recursive(model, Plan.of(4, 2))
    with pytest.raises(ValueError, match=r"ranks: expected linears among self_attn.q_proj.*'q'"):
        make_recursive(model, Plan.of(6, 2, ranks={"q": 3}))
    model.model.layers[4].mlp.up_proj = nn.Linear(24, 41, bias=False, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"same parameters, got mlp.up_proj.weight"):
        make_recursive(model, Plan.of(6, 2))
    model = relaxed("llama")
    with pytest.raises(ValueError, match="not recursive yet"):
        make_recursive(model, Plan.of(6, 2))
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(TypeError, match="expected a list of 6 decoder layers"):
        decoder_layers(model)
    with pytest.raises(TypeError, match=r"expected layers with nn.Linear, got LayerNorm"):
        linear_names(nn.LayerNorm(3))
