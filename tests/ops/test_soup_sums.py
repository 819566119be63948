"""Sums in float64: values, and the same bits however tensors are cut."""

from __future__ import annotations

import pytest
import torch
from soup_problem import DEVICES, DTYPES, bits, generator, models, pieces

from gemma_ext.ops.souping import Gram, Mask, Norms, Part, dots

pytestmark = pytest.mark.parametrize("device", DEVICES)
SPAN, BLOCK = 64 * 4096, 4096


def deltas(part: Part) -> torch.Tensor:
    x = torch.stack([x.cpu().double().reshape(-1) for x in part.sources])
    return x if part.base is None else x - part.base.cpu().double().reshape(-1)


def total(values: torch.Tensor) -> float:
    """In the order of contract.h, from its words, one number after another."""
    grand = span = 0.0
    for at in range(0, len(values), BLOCK):
        if at % SPAN == 0:
            grand, span = grand + span, 0.0
        block = values[at : at + BLOCK]
        strands = [0.0] * 64
        for i, v in enumerate(block.tolist()):
            strands[i % 64] += v
        while len(strands) > 1:
            half = len(strands) // 2
            strands = [a + b for a, b in zip(strands[:half], strands[half:], strict=True)]
        span += strands[0]
    return grand + span


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", [True, False], ids=["base", "plain"])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_gram(dtype, base, count, device):
    part = models((41, 163), count, dtype=dtype, base=base, seed=1, device=device)
    gram = Gram(count)
    gram.add([part])
    d = deltas(part)
    scale = float(d.square().sum(1).amax())
    torch.testing.assert_close(gram.value[0].cpu(), d @ d.T, rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 4095, 4096, 4097, 3 * 4096 + 70, SPAN, SPAN + 129])
def test_the_order_of_a_sum_is_fixed(n, device):
    part = models((n,), 2, dtype=torch.float32, seed=2, device=device)
    gram = Gram(2)
    gram.add([part])
    a, b = deltas(part)
    want = [[total(a * a), total(a * b)], [total(a * b), total(b * b)]]
    assert gram.value[0].tolist() == want


@pytest.mark.parametrize("seed", range(4))
def test_any_cutting_gives_the_same_bits(seed, device):
    n = 2 * SPAN + 3 * BLOCK + 77
    part = models((n,), 2, seed=seed, device=device)
    g = generator(seed)
    edges = sorted({*torch.randint(0, n, (12,), generator=g).tolist(), BLOCK, SPAN, SPAN + BLOCK})
    along = torch.randn(n, generator=g).to(device)
    found = []
    for calls in ([[part]], [[p] for p in pieces(part, edges)], [pieces(part, edges)]):
        gram, norms = Gram(2), Norms(2)
        for parts in calls:
            gram.add(parts)
            norms.add(parts, mask=Mask(density=0.5), seed=3)
        found.append((gram.value, norms.value))
    for gram, norms in found[1:]:
        assert torch.equal(bits(gram), bits(found[0][0]))
        assert torch.equal(bits(norms), bits(found[0][1]))
    whole = dots([part], [along])
    d = deltas(part)
    torch.testing.assert_close(whole[0].cpu(), d @ along.cpu().double(), rtol=1e-11, atol=1e-12)


def test_tensors_one_after_another_in_a_group(device):
    """What follows a tensor that ends inside a block begins a block of its own."""
    parts = [models((n,), 2, seed=n, name=f"t{n}", device=device) for n in (100, 5000, 64, 0, 9)]
    together, apart = Gram(2), Gram(2, groups=5)
    together.add(parts)
    apart.add(parts, range(5))
    one_by_one = Gram(2)
    for part in parts:
        one_by_one.add([part])
    assert torch.equal(bits(together.value), bits(one_by_one.value))
    torch.testing.assert_close(together.value[0], apart.value.sum(0), rtol=1e-13, atol=0)
    for g, part in enumerate(parts):
        alone = Gram(2)
        alone.add([part])
        assert torch.equal(bits(apart.value[g]), bits(alone.value[0]))


def test_reading_a_value_changes_nothing(device):
    part = models((9000,), 2, seed=3, device=device)
    gram, other = Gram(2), Gram(2)
    for one in pieces(part, [10, 4096, 8000]):
        gram.add([one])
        gram.value  # noqa: B018
        other.add([one])
    assert torch.equal(bits(gram.value), bits(other.value))


def test_norms_without_a_mask(device):
    part = models((31, 41), 3, seed=4, device=device)
    norms = Norms(3)
    norms.add([part])
    value = norms.value.cpu()
    assert torch.equal(value[:, :, 0], value[:, :, 1])
    d = deltas(part)
    torch.testing.assert_close(value[0, :, 0, 0], d.abs().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(value[0, :, 0, 1], d.square().sum(1), rtol=1e-12, atol=0)
    assert torch.equal(value[0, :, 0, 2], d.abs().amax(1))


def test_norms_leave_nan_out(device):
    x = torch.tensor([1.0, torch.nan, -2.0], device=device)
    norms = Norms(1)
    norms.add([Part([x])])
    assert norms.value[0, 0, 0].tolist() == [3.0, 5.0, 2.0]


def test_reference_agrees(device):
    part = models((50, 60), 3, seed=5, device=device)
    for make in (Gram, Norms):
        found, want = make(3), make(3, impl="reference")
        for running in (found, want):
            running.add([part])
        torch.testing.assert_close(found.value.cpu(), want.value, rtol=1e-10, atol=1e-15)


def test_dots_of_several_tensors(device):
    parts = [models((7, 11 + t), 3, seed=t, device=device) for t in range(3)]
    along = [torch.randn(7, 11 + t, generator=generator(t)).to(device) for t in range(3)]
    found = dots(parts, along)
    want = dots(parts, along, impl="reference")
    torch.testing.assert_close(found.cpu(), want, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="expected along of 3 parts, got 2"):
        dots(parts, along[:2])
