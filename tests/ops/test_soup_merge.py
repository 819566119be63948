"""`merge_` against loops over single elements: masks, elections, combinations, NaN."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from soup_problem import DEVICES, DTYPES, check_rounded, generator, lattice, models

from gemma_ext.ops.souping import (
    Cut,
    Magnitudes,
    Mask,
    Norms,
    Part,
    Rule,
    merge_,
    overlaps,
    sign_balance,
    soup_,
)
from gemma_ext.reference import random_numbers

pytestmark = pytest.mark.parametrize("device", DEVICES)
ELECTIONS, COMBINES = ("none", "sum", "count"), ("sum", "mean", "weighted_mean", "max")


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def element(rule, weights, delta, mask, divide, alone, scale):
    """One element, from the words of the rule."""
    if any(math.isnan(d) for d in delta):
        return math.nan
    plain = [d / q if m else 0.0 for d, m, q in zip(delta, mask, divide, strict=True)]
    x = [w * y for w, y in zip(weights, plain, strict=True)]
    votes = x if rule.weighted else plain
    if rule.election == "none":
        agree = list(mask)
    else:
        total = sum(votes if rule.election == "sum" else map(sign, votes))
        elected = sign(total) or rule.zero
        agree = [v != 0 and sign(v) == elected for v in votes]
    members = [m for m, a in enumerate(agree) if a]
    if rule.combine == "max":
        result = max((x[m] for m in members), key=lambda y: (abs(y), y), default=0.0)
    else:
        result = sum(x[m] for m in members)
    if rule.combine == "mean":
        result /= max(len(members), 1)
    if rule.combine == "weighted_mean":
        result /= sum(weights[m] for m in members) or 1.0
    if alone is not None and len(members) == 1:
        result *= alone[members[0]]
    return scale * result


def expected(part, rule, weights, mask=None, divide=None, alone=None, scale=1.0):
    base = torch.zeros(part.sources[0].numel(), dtype=torch.float64)
    if part.base is not None:
        base = part.base.cpu().double().reshape(-1)
    deltas = [(x.cpu().double().reshape(-1) - base).tolist() for x in part.sources]
    count = len(deltas)
    masks = [[True] * len(base)] * count if mask is None else mask.tolist()
    divide = [1.0] * count if divide is None else divide
    found = [
        b + element(rule, weights, d, m, divide, alone, scale)
        for b, d, m in zip(
            base.tolist(), zip(*deltas, strict=True), zip(*masks, strict=True), strict=True
        )
    ]
    return torch.tensor(found, dtype=torch.float64)


def cut(part: Part, keep) -> Cut:
    magnitudes = Magnitudes(len(part.sources))
    for _ in range(2):
        magnitudes.survey([part])
        magnitudes.settle(keep)
    return magnitudes.cut()


def largest(part: Part, keep: int) -> torch.Tensor:
    found = []
    for x in part.sources:
        base = 0.0 if part.base is None else part.base.cpu().float().reshape(-1)
        order = (x.cpu().float().reshape(-1) - base).abs().sort(descending=True, stable=True)
        mask = torch.zeros(x.numel(), dtype=torch.bool)
        mask[order.indices[:keep]] = True
        found.append(mask)
    return torch.stack(found)


RULES = [
    Rule(election, weighted, zero, combine)
    for election, weighted, combine in itertools.product(ELECTIONS, (True, False), COMBINES)
    for zero in ((1, -1, 0) if election != "none" else (1,))
]


@pytest.mark.parametrize(
    "rule", RULES, ids=lambda r: f"{r.election}-{r.weighted}-{r.zero}-{r.combine}"
)
def test_every_rule(rule, device):
    """On a lattice with exact sums, so that elections of 0 happen and are the same everywhere."""
    part = lattice((23, 29), 4, seed=1, device=device)
    weights = [1.0, 0.5, 2.0, 0.25]
    for keep in (None, 200):
        mask = None if keep is None else Mask(keep=cut(part, keep))
        merge_([part], rule, weights, mask=mask, scale=0.75)
        kept = None if keep is None else largest(part, keep)
        check_rounded(part.out, expected(part, rule, weights, kept, scale=0.75), share=1.0)


@pytest.mark.parametrize(
    "rule", [Rule(), Rule("sum", combine="mean"), Rule("count", False, -1)], ids=str
)
@pytest.mark.parametrize("base", [True, False], ids=["base", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_bases(rule, base, dtype, device):
    part = models((31, 43), 3, dtype=dtype, base=base, seed=2, device=device)
    merge_([part], rule, [0.5, 1.0, 0.25], divide=[0.5, 1.0, 2.0], scale=1.5)
    want = expected(part, rule, [0.5, 1.0, 0.25], divide=[0.5, 1.0, 2.0], scale=1.5)
    check_rounded(part.out, want, share=0.998)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_any_number_of_models(count, device):
    part = lattice((17, 19), count, seed=count, device=device)
    rule = Rule("sum", combine="weighted_mean")
    weights = [2.0 ** -(m % 4) for m in range(count)]
    merge_([part], rule, weights, mask=Mask(keep=cut(part, 100)))
    check_rounded(part.out, expected(part, rule, weights, largest(part, 100)), share=1.0)


def test_weights_that_cancel_divide_by_one(device):
    part = lattice((9, 11), 2, seed=3, device=device)
    rule = Rule(combine="weighted_mean")
    merge_([part], rule, [1.0, -1.0])
    check_rounded(part.out, expected(part, rule, [1.0, -1.0]), share=1.0)


def test_alone(device):
    part = lattice((23, 31), 3, seed=4, device=device)
    active = Cut.above(2.0**-12 * 5.5, 3, device=device)
    mask = torch.stack(
        [(x - part.base).abs().reshape(-1).cpu() > 2.0**-12 * 5.5 for x in part.sources]
    )
    rule = Rule(combine="mean")
    merge_([part], rule, 1.0, mask=Mask(keep=active), alone=[1.25, 1.5, 1.0])
    check_rounded(
        part.out, expected(part, rule, [1.0] * 3, mask, alone=[1.25, 1.5, 1.0]), share=1.0
    )
    found = overlaps([part], Mask(keep=active))[0].cpu()
    standing = mask.sum(0)
    assert torch.equal(found[:, 0], (mask & (standing == 1)).sum(1))
    assert torch.equal(found[:, 1], (mask & (standing > 1)).sum(1))


def test_largest_dropped_and_the_next_kept(device):
    part = lattice((41, 43), 3, seed=5, device=device)
    both = Magnitudes(3, cuts=2)
    for _ in range(2):
        both.survey([part])
        both.settle([[500, 60]] * 3)
    merge_([part], Rule(), [1.0, 0.5, 0.25], mask=Mask(keep=both.cut(0), drop=both.cut(1)))
    mask = largest(part, 500) & ~largest(part, 60)
    check_rounded(part.out, expected(part, Rule(), [1.0, 0.5, 0.25], mask), share=1.0)


def drawn(part: Part, density: list[float], seed: int, ids=None) -> torch.Tensor:
    key = random_numbers.random_key(seed, part.name)
    n = part.sources[0].numel()
    ids = ids or range(len(part.sources))
    return torch.stack(
        [
            random_numbers.uniforms(key, i, random_numbers.DROP, part.offset, n) < d
            for i, d in zip(ids, density, strict=True)
        ]
    )


def test_random_masks(device):
    part = lattice((37, 41), 3, seed=6, device=device)
    density = [0.1, 0.5, 0.93]
    merge_([part], Rule(), [1.0, 0.5, 0.25], mask=Mask(density=density), divide=[0.5] * 3, seed=11)
    mask = drawn(part, density, 11)
    want = expected(part, Rule(), [1.0, 0.5, 0.25], mask, divide=[0.5] * 3)
    check_rounded(part.out, want, share=1.0)


def test_random_masks_go_with_the_model_not_its_place(device):
    part = lattice((37, 41), 3, seed=7, device=device)
    moved = Part(part.sources[::-1], part.base, torch.empty_like(part.out), part.name, 0, [2, 1, 0])
    mask = Mask(density=0.5)
    merge_([part], Rule(), 1.0, mask=mask, seed=3)
    merge_([moved], Rule(), 1.0, mask=mask, seed=3)
    assert torch.equal(part.out, moved.out)


def test_random_masks_of_densities_at_the_ends(device):
    part = lattice((20, 20), 2, seed=8, device=device)
    want = torch.empty_like(part.out)
    soup_([Part(part.sources, part.base, want)], 0.5)
    merge_([part], Rule(), 0.5, mask=Mask(density=[1.0, 1.0]))
    assert torch.equal(part.out, want)
    merge_([part], Rule(), 0.5, mask=Mask(density=[0.0, 0.0]))
    assert torch.equal(part.out, part.base)


def test_dropped_and_rescaled_deltas_keep_their_mean(device):
    """DARE: mean delta and variance delta^2 (1 - d) / d, within 4 standard errors."""
    n, d, delta = 1 << 20, 0.1, 0.25
    x = torch.full((n,), delta, device=device)
    part = Part([x], torch.zeros(n, device=device), torch.empty(n, device=device), "w")
    merge_([part], Rule(), 1.0, mask=Mask(density=d), divide=d, seed=5)
    found = part.out.double().cpu()
    variance = delta**2 * (1 - d) / d
    assert abs(float(found.mean()) - delta) < 4 * (variance / n) ** 0.5
    fourth = delta**4 * ((1 - d) ** 4 / d**3 + (1 - d))
    assert abs(float(found.var()) - variance) < 4 * ((fourth - variance**2) / n) ** 0.5


def test_masks_of_models_tensors_and_seeds_are_independent(device):
    n = 1 << 18
    ones = torch.ones(n, device=device)

    def kept(seed, name, model):
        out = torch.empty(n, device=device)
        part = Part([ones], None, out, name, 0, [model])
        merge_([part], Rule(), 1.0, mask=Mask(density=0.5), seed=seed)
        return out.cpu()

    first = kept(1, "a", 0)
    for other in (kept(2, "a", 0), kept(1, "b", 0), kept(1, "a", 1)):
        both = float((first * other).mean())
        assert abs(both - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5


def test_neighbouring_positions_are_independent(device):
    n = 1 << 18
    out = torch.empty(n, device=device)
    merge_([Part([torch.ones(n, device=device)], None, out, "w")], Rule(), mask=Mask(density=0.5))
    out = out.cpu()
    for lag in (1, 2, 3, 4, 64):
        both = float((out[lag:] * out[:-lag]).mean())
        assert abs(both - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5


def test_nan_reaches_the_result_and_infinity_stays(device):
    base = torch.zeros(6, device=device)
    a = torch.tensor([torch.nan, 1.0, torch.inf, 1.0, -torch.inf, 2.0], device=device)
    b = torch.tensor([1.0, torch.nan, 1.0, 3.0, torch.inf, -0.0], device=device)
    out = torch.empty(6, device=device)
    part = Part([a, b], base, out, "w")
    for rule in RULES:
        merge_([part], rule, 1.0)
        want = expected(part, rule, [1.0, 1.0])
        got = out.cpu().double()
        assert got[:2].isnan().all()
        torch.testing.assert_close(got[[2, 3, 5]], want[[2, 3, 5]], rtol=0, atol=0, equal_nan=True)
    above = Cut.above(9.0, 2, device=device)
    for mask, opposed in ((Mask(density=0.0), False), (Mask(keep=above), True)):
        merge_([part], Rule(), 1.0, mask=mask)
        assert out.isnan().cpu().tolist() == [True, True, False, False, opposed, False]


def test_identical_models_trimmed_give_the_trimmed_delta(device):
    one = lattice((30, 31), 1, seed=9, device=device)
    part = Part(one.sources * 3, one.base, one.out, "w")
    for rule in (Rule("sum", combine="mean"), Rule("sum", combine="weighted_mean")):
        merge_([part], rule, 1.0, mask=Mask(keep=cut(part, 300)))
        base, x = (t.cpu().reshape(-1) for t in (one.base, one.sources[0]))
        want = torch.where(largest(part, 300)[0], x, base)
        assert torch.equal(part.out.cpu().reshape(-1), want)


def test_density_one_is_task_arithmetic(device):
    part = models((61, 67), 3, seed=10, device=device)
    want = torch.empty_like(part.out)
    soup_([Part(part.sources, part.base, want)], [0.3, 0.2, 0.1], scale=0.7)
    n = part.base.numel()
    merge_([part], Rule(), [0.3, 0.2, 0.1], mask=Mask(keep=cut(part, n)), scale=0.7)
    assert torch.equal(part.out, want)


def test_scale_of_nothing_gives_the_base(device):
    part = models((20, 30), 3, seed=11, device=device)
    merge_([part], Rule("sum", combine="mean"), 1.0, scale=0.0)
    assert torch.equal(part.out, part.base)


def test_many_parts_with_numbers_of_their_own(device):
    parts = [lattice((5 + t, 7), 2, seed=t, device=device) for t in range(20)]
    w = 2.0 ** torch.randint(-3, 2, (20, 2), generator=generator(1)).double()
    divide = 2.0 ** torch.randint(-2, 1, (20, 2), generator=generator(2)).double()
    scale = 2.0 ** torch.randint(-2, 1, (20,), generator=generator(3)).double()
    rule = Rule("count", combine="mean")
    merge_(parts, rule, w, divide=divide, scale=scale)
    for t, part in enumerate(parts):
        want = expected(part, rule, w[t].tolist(), None, divide[t].tolist(), None, float(scale[t]))
        check_rounded(part.out, want, share=1.0)


def test_sign_balance(device):
    parts = [lattice((13, 17), 3, seed=t, device=device) for t in range(3)]
    for rule in (Rule("sum"), Rule("count", False)):
        mask = Mask(keep=cut(parts[0], 99).resolved("all"))
        found = sign_balance(parts, rule, [1.0, 0.5, 2.0], mask=mask).tolist()
        for part, got in zip(parts, found, strict=True):
            delta = torch.stack([(x - part.base).cpu().reshape(-1).double() for x in part.sources])
            kept = delta.float().abs() >= mask.keep.bits.cpu().view(torch.float32).T
            w = torch.tensor([1.0, 0.5, 2.0]).unsqueeze(1).double()
            x = torch.where(kept, delta * (w if rule.weighted else 1.0), 0.0)
            total = x.sum(0) if rule.election == "sum" else x.sign().sum(0)
            assert got == int(total.sign().sum())


def test_masked_norms(device):
    part = models((61, 83), 2, seed=12, device=device)
    keep = cut(part, 1000)
    norms = Norms(2)
    norms.add([part], mask=Mask(keep=keep.fresh(), density=[0.5, 0.9]), seed=3)
    mask = largest(part, 1000) & drawn(part, [0.5, 0.9], 3)
    for m, x in enumerate(part.sources):
        d = (x.cpu().double() - part.base.cpu().double()).reshape(-1)
        for k, y in enumerate((d, torch.where(mask[m], d, 0.0))):
            want = torch.stack([y.abs().sum(), y.square().sum(), y.abs().max()])
            torch.testing.assert_close(norms.value[0, m, k].cpu(), want, rtol=1e-12, atol=0)


def test_reference_agrees(device):
    part = models((31, 37), 3, seed=13, device=device)
    for rule in (Rule("sum", combine="weighted_mean"), Rule("count", False, combine="max")):
        found = {}
        for impl in ("auto", "reference"):
            mask = Mask(keep=cut(part, 500), density=0.8)
            if impl == "reference":
                mask = Mask(keep=Cut(mask.keep.bits.cpu(), mask.keep.ties.cpu()), density=0.8)
            out = torch.empty(31, 37, dtype=torch.float32, device=device)
            merge_(
                [Part(part.sources, part.base, out, part.name)],
                rule,
                [1.0, 0.5, 0.25],
                mask=mask,
                divide=0.8,
                seed=4,
                impl=impl,
            )
            found[impl] = out
        torch.testing.assert_close(found["auto"], found["reference"], rtol=1e-6, atol=0)
