"""`Magnitudes` and cuts: exact counts and thresholds, ties by position, NaN never taken."""

from __future__ import annotations

import pytest
import torch
from soup_problem import DEVICES, DTYPES, bits, generator, lattice, models, pieces

from gemma_ext.ops.souping import Cut, Magnitudes, Mask, Part, Rule, merge_, overlaps

pytestmark = pytest.mark.parametrize("device", DEVICES)


def cuts_of(parts_by_reading, models, keep, **options):
    magnitudes = Magnitudes(models, **{k: v for k, v in options.items() if k != "groups_of"})
    for _ in range(2):
        for parts in parts_by_reading:
            magnitudes.survey(parts, options.get("groups_of", 0))
        magnitudes.settle(keep)
    return magnitudes


def largest(delta: torch.Tensor, keep: int) -> torch.Tensor:
    """bool: the `keep` largest |delta|, by a stable sort; NaN is none of them."""
    size = delta.float().abs()
    size = torch.where(size.isnan(), -1.0, size)
    order = size.sort(descending=True, stable=True).indices
    chosen = torch.zeros(len(delta), dtype=torch.bool)
    chosen[order[:keep]] = True
    return chosen & (size >= 0)


def delta_of(part: Part, m: int) -> torch.Tensor:
    x = part.sources[m].cpu().float().reshape(-1)
    return x if part.base is None else x - part.base.cpu().float().reshape(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.999, 1.0, 2.0])
def test_cut_takes_exactly_the_largest(dtype, share, device):
    part = models((57, 83), 3, dtype=dtype, seed=1, device=device)
    n = part.base.numel()
    keep = int(share * n)
    cut = cuts_of([[part]], 3, keep).cut()
    for m in range(3):
        target = torch.zeros(57, 83, device=device)
        one = Cut(cut.bits[:, m : m + 1], cut.ties[:, m : m + 1])
        x = Part([part.sources[m]], part.base, target, "w")
        counted = overlaps([x], Mask(keep=one.fresh()))
        assert int(counted.sum()) == min(keep, n)
        merge_([x], Rule(), 1.0, mask=Mask(keep=one.fresh()))
        want = largest(delta_of(part, m), keep)
        base = part.base.cpu().float().reshape(-1)
        moved = torch.where(want, part.sources[m].cpu().float().reshape(-1), base)
        assert torch.equal(target.cpu().reshape(-1), moved)


def test_ties_go_to_the_lowest_positions(device):
    part = lattice((40, 50), 2, seed=2, device=device)
    for keep in (0, 1, 7, 100, 999, 1000, 1999, 2000):
        cut = cuts_of([[part]], 2, keep).cut()
        out = torch.empty(40, 50, device=device)
        for m in range(2):
            one = Cut(cut.bits[:, m : m + 1], cut.ties[:, m : m + 1].clone())
            x = Part([part.sources[m]], part.base, out, "w")
            merge_([x], Rule(), 1.0, mask=Mask(keep=one))
            kept = largest(delta_of(part, m), keep)
            base = part.base.cpu().reshape(-1)
            want = torch.where(kept, part.sources[m].cpu().reshape(-1), base)
            assert torch.equal(out.cpu().reshape(-1), want)
            assert int(one.ties) == 0


def test_all_elements_equal(device):
    n = 1000
    x = torch.full((n,), 0.5, device=device)
    part = Part([x], torch.zeros(n, device=device), torch.empty(n, device=device))
    for keep in (1, 500, 1000):
        cut = cuts_of([[part]], 1, keep).cut()
        merge_([part], Rule(), 1.0, mask=Mask(keep=cut))
        assert torch.equal(part.out.cpu(), torch.where(torch.arange(n) < keep, 0.5, 0.0))


@pytest.mark.parametrize("seed", range(5))
def test_any_cutting_gives_the_same_cut(seed, device):
    part = models((31, 117), 3, seed=seed, device=device)
    n = part.base.numel()
    g = generator(seed)
    whole = cuts_of([[part]], 3, n // 3)
    edges = sorted(torch.randint(0, n, (7,), generator=g).tolist())
    broken = cuts_of([[p] for p in pieces(part, edges)], 3, n // 3)
    backwards = cuts_of([[p] for p in pieces(part, edges)[::-1]], 3, n // 3)
    for other in (broken, backwards):
        assert torch.equal(other.cut().bits, whole.cut().bits)
        assert torch.equal(other.cut().ties, whole.cut().ties)
        assert torch.equal(other.counts, whole.counts)
        assert torch.equal(other.zeros, whole.zeros)
    at_once = cuts_of([[*pieces(part, edges)]], 3, n // 3)
    assert torch.equal(at_once.cut().bits, whole.cut().bits)


def test_cut_of_a_whole_model(device):
    parts = [models((11 + t, 13), 2, seed=t, name=f"t{t}", device=device) for t in range(5)]
    total = sum(p.base.numel() for p in parts)
    cut = cuts_of([parts], 2, total // 4).cut()
    for m in range(2):
        delta = torch.cat([delta_of(p, m) for p in parts])
        want = largest(delta, total // 4)
        got = [
            overlaps([Part([p.sources[m]], p.base)], Mask(keep=one))
            for one in [Cut(cut.bits[:, m : m + 1], cut.ties[:, m : m + 1].clone())]
            for p in parts
        ]
        assert sum(int(x.sum()) for x in got) == total // 4
        start = 0
        for p, x in zip(parts, got, strict=True):
            assert int(x.sum()) == int(want[start : start + p.base.numel()].sum())
            start += p.base.numel()


def test_groups_are_cut_on_their_own(device):
    parts = [models((9 + t, 21), 2, seed=t, name=f"t{t}", device=device) for t in range(4)]
    keep = torch.tensor([[[3 + t], [5 * t]] for t in range(4)])
    magnitudes = cuts_of([parts], 2, keep, groups=4, groups_of=range(4))
    cut = magnitudes.cut()
    assert cut.bits.shape == (4, 2)
    counted = overlaps(parts, Mask(keep=cut))
    for t, part in enumerate(parts):
        alone = cuts_of([[part]], 2, keep[t]).cut()
        assert torch.equal(cut.bits[t : t + 1], alone.bits)
        both = int(counted[t, 0].sum()), int(counted[t, 1].sum())
        assert both == (3 + t, 5 * t)


def test_several_cuts_of_one_survey(device):
    part = models((40, 41), 2, seed=9, device=device)
    magnitudes = cuts_of([[part]], 2, torch.tensor([[300, 20], [200, 0]]), cuts=2)
    for index, keep in enumerate(([300, 200], [20, 0])):
        want = cuts_of([[part]], 2, keep).cut()
        assert torch.equal(magnitudes.cut(index).bits, want.bits)
        assert torch.equal(magnitudes.cut(index).ties, want.ties)
    both = Mask(keep=magnitudes.cut(0), drop=magnitudes.cut(1))
    assert overlaps([part], both).sum(-1).tolist() == [[280, 200]]


def test_zeros_and_nan_are_counted_for_what_they_are(device):
    x = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, 1.0, 2.0], device=device)
    part = Part([x], None, torch.empty(8, device=device))
    magnitudes = cuts_of([[part]], 1, 4)
    assert magnitudes.counts.tolist() == [[7]]
    assert magnitudes.zeros.tolist() == [[2]]
    merge_([part], Rule(), 1.0, mask=Mask(keep=magnitudes.cut()))
    want = torch.tensor([0.0, 0.0, torch.nan, torch.inf, -torch.inf, 0.0, 1.0, 2.0])
    torch.testing.assert_close(part.out.cpu(), want, rtol=0, atol=0, equal_nan=True)
    everything = cuts_of([[part]], 1, 99).cut()
    assert everything.bits.tolist() == [[0]]
    assert everything.ties.tolist() == [[2]]


def test_subnormal_magnitudes_are_told_apart(device):
    x = torch.tensor([1, 2, 3, 70_000, 65_536, 65_537], dtype=torch.int32).view(torch.float32)
    part = Part([x.to(device)], None, torch.empty(6, device=device))
    for keep in range(7):
        cut = cuts_of([[part]], 1, keep).cut()
        merge_([part], Rule(), 1.0, mask=Mask(keep=cut))
        want = x[x.argsort(descending=True)[:keep]].sort().values
        assert torch.equal(bits(part.out.cpu()[part.out.cpu() != 0].sort().values), bits(want))


def test_cut_by_variance(device):
    part = models((31, 47), 4, seed=3, device=device)
    n = part.base.numel()
    magnitudes = cuts_of([[part]], 4, n // 5, quantity="variance")
    cut = magnitudes.cut()
    assert cut.quantity == "variance"
    assert cut.bits.shape == (1, 1)
    delta = torch.stack([delta_of(part, m) for m in range(4)])
    variance = delta.double().var(0, unbiased=False)
    counted = overlaps([part], Mask(keep=cut.fresh()))
    assert counted.tolist() == [[[0, n // 5]] * 4]
    weights = torch.zeros(4)
    weights[0] = 1.0
    out = torch.empty(31, 47, device=device)
    merge_([Part(part.sources, part.base, out)], Rule(), weights, mask=Mask(keep=cut))
    moved = (out.cpu() != part.base.cpu().float()).reshape(-1)
    bound = variance.sort(descending=True).values[n // 5 - 1]
    assert not moved[variance < bound * (1 - 1e-5)].any()


def test_named_thresholds(device):
    x = torch.tensor([0.5, -1.0, 1.0, 1.5, torch.nan, 0.0], device=device)
    part = Part([x], None, None)
    above = Cut.above(1.0, 1, device=device)
    assert overlaps([part], Mask(keep=above)).sum() == 1
    at_least = Cut.above(1.0, 1, inclusive=True, device=device)
    assert overlaps([part], Mask(keep=at_least)).sum() == 3
    three = cuts_of([[part]], 1, 2).cut()
    assert overlaps([part], Mask(keep=three.fresh())).sum() == 2
    assert overlaps([part], Mask(keep=three.resolved("all"))).sum() == 3
    assert overlaps([part], Mask(keep=three.resolved("none"))).sum() == 1
    nothing = cuts_of([[part]], 1, 0).cut()
    assert overlaps([part], Mask(keep=nothing.resolved("all"))).sum() == 0


def test_parts_share_the_ties_of_one_cut(device):
    part = lattice((30, 30), 1, seed=4, device=device)
    cut = cuts_of([[part]], 1, 400).cut()
    whole = torch.empty(900, device=device)
    merge_([Part(part.sources, part.base, whole.view(30, 30))], Rule(), mask=Mask(keep=cut.fresh()))
    broken = torch.empty(900, device=device)
    cut = cut.fresh()
    for one in pieces(Part(part.sources, part.base, broken.view(30, 30)), [1, 13, 500, 501]):
        merge_([one], Rule(), mask=Mask(keep=cut))
    assert torch.equal(whole, broken)
    assert int(cut.ties) == 0


def test_reference_agrees(device):
    part = models((29, 31), 3, seed=5, device=device)
    for quantity in ("delta", "variance"):
        found = cuts_of([[part]], 3, 111, quantity=quantity).cut()
        want = cuts_of([[part]], 3, 111, quantity=quantity, impl="reference").cut()
        assert torch.equal(found.bits.cpu(), want.bits)
        assert torch.equal(found.ties.cpu(), want.ties)


def test_third_reading_and_early_cut_are_refused(device):
    part = models((3, 4), 1, device=device)
    magnitudes = Magnitudes(1)
    with pytest.raises(ValueError, match="expected two readings before a cut, got 0"):
        magnitudes.cut()
    for _ in range(2):
        magnitudes.survey([part])
        magnitudes.settle(3)
    with pytest.raises(ValueError, match="got a third"):
        magnitudes.survey([part])
    with pytest.raises(ValueError, match="got a third"):
        magnitudes.settle(3)
