"""Masks by the place in a row, and rows taken from other tables."""

from __future__ import annotations

import pytest
import torch
from soup_problem import (
    DEVICES,
    DTYPES,
    assert_same_bits,
    check_rounded,
    generator,
    lattice,
    models,
)

from gemma_ext.ops.souping import (
    Norms,
    Part,
    RowMask,
    Rule,
    gather_rows_,
    gram_rows,
    merge_,
    overlaps,
)
from gemma_ext.reference import random_numbers

pytestmark = pytest.mark.parametrize("device", DEVICES)


def places(delta: torch.Tensor) -> torch.Tensor:
    """From the largest down, lowest column first, row by row and one at a time."""
    found = torch.empty(delta.shape, dtype=torch.int64)
    for r, row in enumerate(delta.float().abs().tolist()):
        for q, c in enumerate(sorted(range(len(row)), key=lambda c: (-row[c], c))):
            found[r, c] = q
    return found


def expected(part: Part, mask: torch.Tensor, divide=None):
    base = part.base.cpu().double()
    total = base.clone()
    for m, x in enumerate(part.sources):
        delta = x.cpu().double() - base
        if divide is not None:
            delta = delta / divide[m]
        total += torch.where(mask[m], delta, 0.0)
    return total


def delta_of(part: Part, m: int) -> torch.Tensor:
    return (part.sources[m].cpu().float() - part.base.cpu().float()).reshape(
        -1, part.base.shape[-1]
    )


@pytest.mark.parametrize("shape", [(13, 29), (3, 1), (1, 2500), (40,), (2, 3, 17), (1, 1)], ids=str)
@pytest.mark.parametrize(("keep", "drop"), [(5, 0), (3, 2), (None, 1), (0, 0), (999_999, 0)])
def test_places_of_rows(shape, keep, drop, device):
    part = lattice(shape, 3, seed=1, device=device)
    merge_([part], Rule(), 1.0, mask=RowMask(keep=keep, drop=drop))
    last = 10**9 if keep is None else drop + keep
    order = [places(delta_of(part, m)) for m in range(3)]
    mask = torch.stack([((q >= drop) & (q < last)).reshape(shape) for q in order])
    check_rounded(part.out, expected(part, mask), share=1.0)
    counted = overlaps([part], RowMask(keep=keep, drop=drop))
    assert counted.sum(-1)[0].cpu().tolist() == mask.reshape(3, -1).sum(1).tolist()


def test_numbers_of_models(device):
    part = lattice((11, 23), 3, seed=2, device=device)
    merge_([part], Rule(), 1.0, mask=RowMask(keep=[1, 10, 23], drop=[0, 3, 1]))
    order = [places(delta_of(part, m)) for m in range(3)]
    limits = [(0, 1), (3, 13), (1, 24)]
    mask = torch.stack([(q >= a) & (q < b) for q, (a, b) in zip(order, limits, strict=True)])
    check_rounded(part.out, expected(part, mask), share=1.0)


def probabilities(delta, density, epsilon, spread):
    n = delta.shape[-1]
    if spread == "rank":
        share = (n - 1 - places(delta)).double() / max(n - 1, 1)
        share = share if n > 1 else torch.full_like(share, 0.5)
    else:
        size = delta.double().abs()
        low, high = size.amin(-1, keepdim=True), size.amax(-1, keepdim=True)
        share = torch.where(high > low, (size - low) / (high - low), 0.5)
    return density - epsilon + 2 * epsilon * share


@pytest.mark.parametrize("spread", ["rank", "value"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("shape", [(19, 31), (7, 1), (3, 600), (33,)], ids=str)
def test_draws_by_rank(spread, rescale, shape, device):
    """DELLA: survivors are those whose random number is below their probability."""
    part = models(shape, 2, dtype=torch.float32, seed=3, device=device)
    mask = RowMask(density=[0.5, 0.7], epsilon=[0.2, 0.1], spread=spread, rescale=rescale)
    merge_([part], Rule(), 1.0, mask=mask, seed=7)
    key, n = random_numbers.random_key(7, part.name), part.base.numel()
    kept, divide = [], []
    for m, (d, e) in enumerate(((0.5, 0.2), (0.7, 0.1))):
        p = probabilities(delta_of(part, m), d, e, spread).reshape(shape)
        u = random_numbers.uniforms(key, m, random_numbers.DROP, 0, n).reshape(shape)
        assert ((u - p).abs() > 1e-6).all()  # else float32 might decide otherwise
        kept.append(u < p)
        divide.append(p)
    want = expected(part, torch.stack(kept), divide if rescale else None)
    if rescale:  # by a probability in float32
        torch.testing.assert_close(part.out.cpu().double(), want, rtol=2.0**-24, atol=1e-9)
    else:
        check_rounded(part.out, want)


def test_survivors_keep_their_mean(device):
    """Each is divided by its probability: the mean over draws is the delta."""
    part = models((1, 64), 1, dtype=torch.float32, spread=1.0, seed=4, device=device)
    draws = 4000
    rows = Part(
        [part.sources[0].repeat(draws, 1)],
        part.base.repeat(draws, 1),
        torch.empty(draws, 64, device=device),
        "w",
    )
    merge_([rows], Rule(), mask=RowMask(density=0.5, epsilon=0.3, rescale=True), seed=1)
    found = (rows.out - rows.base).double().cpu()
    delta = delta_of(part, 0)[0].double()
    p = probabilities(delta.unsqueeze(0), 0.5, 0.3, "rank")[0]
    error = (delta.square() * (1 - p) / p / draws).sqrt()
    assert ((found.mean(0) - delta).abs() < 5 * error + 1e-7).all()


def test_chunks_of_rows_are_the_same(device):
    part = models((37, 53), 3, seed=5, device=device)
    mask = RowMask(keep=30, drop=2, density=0.6, epsilon=0.1, rescale=True)
    merge_([part], Rule("sum", combine="mean"), mask=mask, seed=9)
    whole = part.out.clone()
    for a, b in ((0, 1), (1, 20), (20, 37)):
        one = Part([x[a:b] for x in part.sources], part.base[a:b], part.out[a:b], part.name, a * 53)
        merge_([one], Rule("sum", combine="mean"), mask=mask, seed=9)
    assert_same_bits(part.out, whole)


def test_norms_of_row_masks(device):
    part = models((300, 1100), 2, seed=6, device=device)  # rows across spans and blocks
    mask = RowMask(keep=100, drop=7)
    norms = Norms(2)
    norms.add([part], mask=mask)
    for m in range(2):
        delta = delta_of(part, m)
        q = delta.abs().sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        kept = torch.where((q >= 7) & (q < 107), delta.double(), 0.0)
        want = torch.stack([kept.abs().sum(), kept.square().sum(), kept.abs().max()])
        torch.testing.assert_close(norms.value[0, m, 1].cpu(), want, rtol=1e-12, atol=0)


def test_reference_agrees(device):
    part = models((23, 47), 3, seed=7, device=device)
    found = []
    for impl in ("auto", "reference"):
        out = torch.empty(23, 47, device=device)
        merge_(
            [Part(part.sources, part.base, out, part.name)],
            Rule("sum", combine="weighted_mean"),
            [1.0, 0.5, 0.25],
            mask=RowMask(keep=40, drop=1, density=0.7, epsilon=0.2, rescale=True),
            seed=2,
            impl=impl,
        )
        found.append(out)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def test_nan_in_a_row(device):
    base = torch.zeros(1, 6, device=device)
    x = torch.tensor([[3.0, torch.nan, 1.0, torch.inf, 0.0, 2.0]], device=device)
    out = torch.empty_like(base)
    merge_([Part([x], base, out)], Rule(), mask=RowMask(keep=2))
    want = torch.tensor([[3.0, torch.nan, 0.0, torch.inf, 0.0, 0.0]])
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(7, 65), (3, 9000), (5, 1), (64,)], ids=str)
def test_gram_of_rows(shape, device):
    part = models(shape, 3, seed=8, device=device)
    found = gram_rows([part, part]).cpu()
    rows = 1 if len(shape) == 1 else shape[0]
    assert found.shape == (2 * rows, 3, 3)
    d = torch.stack([delta_of(part, m).double() for m in range(3)], 1)
    scale = d.square().sum(-1).amax()
    torch.testing.assert_close(found[:rows], d @ d.mT, rtol=0, atol=1e-13 * float(scale))
    assert torch.equal(found[:rows], found[rows:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 640, 1025])
def test_rows_from_other_tables(dtype, width, device):
    g = generator(9)
    tables = [torch.randn(n, width, generator=g).to(dtype).to(device) for n in (40, 25, 33)]
    rows = torch.stack([torch.randint(-1, len(t), (70,), generator=g) for t in tables], 1)
    rows[:5] = -1
    rows[5, 1:] = -1
    out = torch.full((70, width), torch.nan, dtype=dtype, device=device)
    gather_rows_(out, tables, rows.to(device))
    for v, owners in enumerate(rows.tolist()):
        mine = [t[r].cpu() for t, r in zip(tables, owners, strict=True) if r >= 0]
        if len(mine) == 1:
            assert_same_bits(out[v], mine[0])
        elif mine:
            ascending = torch.stack(mine).float().sort(0).values
            total = ascending[0]
            for x in ascending[1:]:
                total = total + x
            assert_same_bits(out[v], (total / len(mine)).to(dtype))
        else:
            assert not out[v].any()
    again = torch.empty_like(out)
    gather_rows_(again, tables, rows.to(device), impl="reference")
    torch.testing.assert_close(out.double(), again.double(), rtol=2.0**-7, atol=0)


def test_tables_of_several_dtypes(device):
    a, b = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device).bfloat16()
    rows = torch.tensor([[0, -1], [-1, 2], [1, 1]], device=device)
    out = torch.empty(3, 3, dtype=torch.float16, device=device)
    gather_rows_(out, [a, b], rows)
    assert torch.equal(out[0], a[0].half())
    assert torch.equal(out[1], b[2].half())
    assert torch.equal(out[2], ((a[1] + b[1].float()) / 2).half())


def test_no_rows(device):
    out = torch.empty(0, 5, device=device)
    gather_rows_(out, [torch.zeros(3, 5, device=device)], torch.zeros(0, 1).long().to(device))
