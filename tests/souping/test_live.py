"""Soups, averages and swaps in models that are in use."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_lm import batch, gemma2, tuned
from torch import nn

from gemma_ext.souping.engine.memory import merge_tensors
from gemma_ext.souping.live import Ema, Swap, ema_, parameters_of, soup_
from gemma_ext.souping.methods import METHODS
from gemma_ext.souping.parameters import constant


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def models(request):
    base = gemma2(dtype=request.param)
    return base, [tuned(base, seed) for seed in (1, 2, 3)]


def doubles(model):
    return {n: p.detach().double().clone() for n, p in model.named_parameters()}


def assert_model(model, expected):
    for name, parameter in model.named_parameters():
        rounded = expected[name].to(parameter.dtype)
        ulp = torch.finfo(parameter.dtype).eps * expected[name].abs().clamp(min=1e-3)
        assert ((parameter.double() - rounded.double()).abs() <= ulp).all(), name


def test_soup_into_a_live_model(models):
    _, (model, *others) = models
    weights = [0.5, 0.3, 0.2]
    sources = [doubles(m) for m in (model, *others)]
    expected = {n: sum(w * s[n] for w, s in zip(weights, sources, strict=True)) for n in sources[0]}
    kept = dict(model.named_parameters())
    soup_(model, others, weights)
    assert_model(model, expected)
    assert all(kept[n] is p for n, p in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_soup_with_a_base(models):
    base, (model, other, _) = models
    b, x, y = doubles(base), doubles(model), doubles(other)
    soup_(model, [other], [1.0, -0.5], base=base, scale=0.7)
    assert_model(model, {n: b[n] + 0.7 * (x[n] - b[n] - 0.5 * (y[n] - b[n])) for n in b})


def test_soup_of_one_hot_weights_is_exact(models):
    _, (model, *others) = models
    soup_(model, others, [0.0, 0.0, 1.0])
    for ours, theirs in zip(model.parameters(), others[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_soup_of_mappings():
    own = {"w": torch.ones(3)}
    soup_(
        own,
        [{"w": torch.full((3,), 3.0, dtype=torch.bfloat16), "unused": torch.ones(1)}],
        [0.5, 0.5],
    )
    assert torch.equal(own["w"], torch.full((3,), 2.0))


def test_gradients_and_buffers_are_not_touched():
    model = nn.BatchNorm1d(3)
    other = copy.deepcopy(model)
    other.running_mean.fill_(7.0)
    model.weight.grad = torch.ones(3)
    soup_(model, [other], [0.5, 0.5])
    assert torch.equal(model.running_mean, torch.zeros(3))
    assert torch.equal(model.weight.grad, torch.ones(3))
    assert model.weight.requires_grad


@pytest.mark.parametrize(
    ("others", "weights", "message"),
    [
        ([{"w": torch.ones(3)}], [1.0], "expected 2 weights, got 1"),
        ([{"v": torch.ones(3)}], [1.0, 1.0], r"expected w in others\[0\], got none"),
        (
            [{"w": torch.ones(4)}],
            [1.0, 1.0],
            r"expected w of others\[0\] to be \[3\], got \[4\]",
        ),
    ],
)
def test_soup_arguments(others, weights, message):
    with pytest.raises(ValueError, match=message):
        soup_({"w": torch.ones(3)}, others, weights)


def test_ema_is_the_recurrence():
    base = gemma2()
    tunes = [tuned(base, seed) for seed in (1, 2, 3)]
    ema = Ema(base, 0.9)
    expected = doubles(base)
    for model in tunes:
        ema.update(model)
        x = doubles(model)
        expected = {n: 0.9 * e + 0.1 * x[n] for n, e in expected.items()}
    for name, tensor in ema.tensors.items():
        assert torch.allclose(tensor.double(), expected[name], rtol=0, atol=1e-6)
    assert ema.steps == 3


def test_stochastic_rounding_keeps_small_steps():
    """200 steps of a hundredth of a unit in the last place: nearest stands still."""
    n, steps, decay = 4096, 200, 0.99
    start, goal = torch.full((n,), 1.0, dtype=torch.bfloat16), torch.full((n,), 1.0078125)
    ema, still = Ema({"w": start}, decay), Ema({"w": start}, decay, rounding="nearest")
    for _ in range(steps):
        ema.update({"w": goal})
        still.update({"w": goal})
    assert torch.equal(still.tensors["w"], start)
    expected = 1.0 + 0.0078125 * (1 - decay**steps)
    mean = float(ema.tensors["w"].double().mean())
    assert abs(mean - expected) < 5 * 0.0078125 / n**0.5
    assert torch.equal(goal, torch.full((n,), 1.0078125))


def test_ema_goes_on_from_its_state():
    first, goal = {"w": torch.ones(64, dtype=torch.bfloat16)}, {"w": torch.full((64,), 1.01)}
    whole = Ema(first, 0.9, seed=5)
    for _ in range(6):
        whole.update(goal)
    half = Ema(first, 0.9, seed=5)
    for _ in range(3):
        half.update(goal)
    state = copy.deepcopy(half.state_dict())
    resumed = Ema(first, 0.9)
    resumed.load_state_dict(state)
    for _ in range(3):
        resumed.update(goal)
    assert torch.equal(resumed.tensors["w"], whole.tensors["w"])


def test_ema_into_a_reference_model(models):
    base, (policy, *_) = models
    reference, before, after = copy.deepcopy(base), doubles(base), doubles(policy)
    ema_(reference, policy, 0.4, rounding="nearest")
    assert_model(reference, {n: 0.4 * before[n] + 0.6 * after[n] for n in before})
    with pytest.raises(ValueError, match=r"expected decay in \[0, 1\], got 1.5"):
        ema_(reference, policy, 1.5)
    with pytest.raises(ValueError, match=r"expected decay in \[0, 1\], got -1"):
        Ema(reference, -1)


@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties", "model_stock", "ties_ref"])
def test_swap_is_the_merge_and_back(models, name):
    base, tunes = models
    running = copy.deepcopy(base)
    method = METHODS[name]
    keys = {"weight": 0.6, "density": 0.5} if name not in ("model_stock",) else {}
    keys = {k: v for k, v in keys.items() if k in {p.key for p in method.parameters}}
    origin = None if method.base == "unused" else running
    before = [id(p) for p in running.parameters()]
    with Swap(running) as swap:
        swap.merge(method(), tunes, origin, seed=3, **keys)
        expected = merge_tensors(
            method(), [parameters_of(t) for t in tunes],
            None if origin is None else parameters_of(base), constant(method, 3, seed=3, **keys)
        )  # fmt: skip
        for n, p in running.named_parameters():
            assert torch.equal(p, expected[n]), n
        swap.merge(method(), tunes[:2], origin, seed=4, **keys)
        assert any(not torch.equal(p, expected[n]) for n, p in running.named_parameters())
    for ours, theirs in zip(running.parameters(), base.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert before == [id(p) for p in running.parameters()]


def test_swap_changes_what_the_model_says(models):
    base, tunes = models
    running, tokens = copy.deepcopy(base), batch()
    own = running(**tokens).logits
    swap = Swap(running)
    swap.merge(METHODS["linear"](), tunes[:1], weight=1.0)
    assert torch.equal(running(**tokens).logits, tunes[0](**tokens).logits)
    swap.put(tunes[1])
    assert torch.equal(running(**tokens).logits, tunes[1](**tokens).logits)
    swap.restore()
    swap.restore()
    assert torch.equal(running(**tokens).logits, own)


def test_running_model_stands_for_its_own_weights(models):
    base, tunes = models
    running = copy.deepcopy(base)
    with Swap(running) as swap:
        swap.merge(METHODS["linear"](), [running, tunes[0]], weight=[0.5, 0.5])
        once = parameters_of(copy.deepcopy(running))
        swap.merge(METHODS["linear"](), [running, tunes[0]], weight=[0.5, 0.5])
        for name, tensor in parameters_of(running).items():
            assert torch.equal(tensor, once[name])


def test_failed_swap_leaves_the_model_alone(models):
    base, tunes = models
    running = copy.deepcopy(base)

    class Fails(METHODS["linear"]):
        def merge_all(self, parts, states):
            half = len(parts) // 2
            super().merge_all(parts[:half], states[:half])
            raise RuntimeError("half way")

    swap = Swap(running)
    with pytest.raises(RuntimeError, match="half way"):
        swap.merge(Fails(), tunes, weight=1.0)
    for ours, theirs in zip(running.parameters(), base.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert swap.own is None
