"""Sums over models do not depend on the order of the models, bit by bit; what adds nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from soup_problem import DEVICES, DTYPES, assert_same_bits, bits, generator, models

from gemma_ext.ops.souping import (
    Magnitudes,
    Mask,
    Part,
    Rule,
    consensus_,
    crossover_,
    fisher_,
    gather_rows_,
    merge_,
    sign_balance,
    soup_,
)
from gemma_ext.reference.souping import sum_models

pytestmark = pytest.mark.parametrize("device", DEVICES)
COUNTS = range(1, 17)
IMPLS = ("auto", "reference")


def family(count: int, dtype=torch.bfloat16, *, device="cpu", base=True, shape=(7, 83)) -> Part:
    """Models with some equal elements, zeros of both signs and what is not finite."""
    part = models(shape, count, dtype=dtype, seed=count, device=device, base=base)
    g = generator(count + 100)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 0.01, -0.01])
    for x in part.sources:
        some = torch.randint(0, x.numel(), (60,), generator=g).to(device)
        values = special[torch.randint(0, 8, (60,), generator=g)].to(device, dtype)
        x.view(-1)[some] = values
        x.view(-1)[:9] = -0.0 if len(part.sources) % 2 else 0.0
    return part


def orders(count: int, seed: int):
    """Some orders of `count` models, all of up to 4."""
    if count <= 4:
        return itertools.permutations(range(count))
    g = generator(seed)
    return [torch.randperm(count, generator=g).tolist() for _ in range(6)]


def weights_of(count: int) -> dict[str, list[float]]:
    given = torch.rand(count, generator=generator(count)) - 0.3
    given[count // 2 :: 3] = 0.0
    return {"equal": [1.0 / count] * count, "any": given.tolist()}


def moved(part: Part, order) -> Part:
    return Part([part.sources[m] for m in order], part.base, part.out, part.name, 0, list(order))


RULES = (
    Rule(),
    Rule(combine="mean"),
    Rule(combine="weighted_mean"),
    Rule(combine="max"),
    Rule("sum", combine="mean"),
    Rule("sum", combine="weighted_mean"),
    Rule("sum", weighted=False, combine="weighted_mean"),
    Rule("count", combine="sum"),
)
SUMS = {
    "soup": lambda p, w, i: soup_([p], w, scale=0.7, impl=i),
    "soup wide": lambda p, w, i: soup_([p], w, wide=True, impl=i),
    "soup by row": lambda p, w, i: soup_([p], torch.tensor([w] * 7), rows=True, impl=i),
    "consensus": lambda p, w, i: consensus_([p], 0.3, votes=1, impl=i),
    "blend": lambda p, w, i: crossover_([p], [abs(x) for x in w], kind="blend", impl=i),
} | {
    f"{r.election} {r.weighted} {r.combine}": lambda p, w, i, r=r: merge_([p], r, w, impl=i)
    for r in RULES
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SUMS)
def test_any_order_of_models(name, impl, device):
    for count in COUNTS if impl == "auto" else (3, 7):
        part = family(count, device=device)
        for weights in weights_of(count).values():
            SUMS[name](part, weights, impl)
            want = part.out.clone()
            for order in orders(count, count):
                part.out.fill_(7.0)
                SUMS[name](moved(part, order), [weights[m] for m in order], impl)
                assert_same_bits(part.out, want)


@pytest.mark.parametrize("base", [True, False], ids=["base", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_order_in_every_type(dtype, base, device):
    for count in (3, 4, 8, 11):
        part = family(count, dtype, device=device, base=base)
        weights = weights_of(count)["any"]
        mask, rule = Mask(density=0.6), Rule("sum", combine="weighted_mean")
        for call in (
            lambda p, w: soup_([p], w),
            lambda p, w, r=rule, k=mask: merge_([p], r, w, mask=k, seed=4),
        ):
            call(part, weights)
            want = part.out.clone()
            for order in orders(count, 1):
                call(moved(part, order), [weights[m] for m in order])
                assert_same_bits(part.out, want)


def test_any_order_of_trims_and_variances(device):
    for count in (3, 5, 9):
        part = family(count, device=device)
        weights = weights_of(count)["any"]
        found = []
        for order in orders(count, 2):
            p = moved(part, order)
            trims, spread = Magnitudes(count), Magnitudes(count, quantity="variance")
            trims.find([p], 100)
            spread.find([p], 200)
            mask = Mask(trims.cut(), None, 0.8)
            w = [weights[m] for m in order]
            balance = sign_balance([p], Rule("sum"), w, mask=Mask(spread.cut()))
            merge_([p], Rule("sum", combine="weighted_mean"), w, mask=mask, seed=3)
            found.append((part.out.clone(), spread.cut().bits, balance))
        for out, cut, balance in found[1:]:
            assert_same_bits(out, found[0][0])
            assert torch.equal(cut, found[0][1])
            assert torch.equal(balance, found[0][2])


@pytest.mark.parametrize("base", [True, False], ids=["base", "plain"])
@pytest.mark.parametrize("impl", IMPLS)
def test_any_order_of_fishers(impl, base, device):
    for count in (3, 4, 6):
        part = family(count, device=device, base=base)
        g = generator(count)
        fishers = [torch.rand(7, 83, generator=g).to(device) for _ in range(count)]
        for f in fishers:
            f[:2] = 0.0
        weights = torch.rand(count, generator=g).tolist()
        found = []
        for order in orders(count, 3):
            picked = [fishers[m] for m in order]
            fisher_([moved(part, order)], [picked], [weights[m] for m in order], impl=impl)
            found.append(part.out.clone())
        for out in found[1:]:
            assert_same_bits(out, found[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_any_order_of_tables(impl, device):
    g = generator(4)
    tables = [torch.randn(20, 33, generator=g).to(device) for _ in range(5)]
    rows = torch.randint(-1, 20, (50, 5), generator=g)
    rows[0] = -1
    want = torch.empty(50, 33, device=device)
    gather_rows_(want, tables, rows.to(device), impl=impl)
    assert not bits(want[0]).any()
    for order in orders(5, 4):
        out = torch.empty_like(want)
        gather_rows_(out, [tables[m] for m in order], rows[:, order].to(device), impl=impl)
        assert_same_bits(out, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_hot_weights_give_the_source_with_its_zeros(dtype, impl, device):
    for count in (1, 2, 3, 5, 9):
        part = models((5, 41), count, dtype=dtype, seed=count, base=False, device=device)
        for x in part.sources:
            x[0, ::2], x[1, ::3] = -0.0, 0.0
        part.sources[-1][2, 5] = -torch.inf
        for m in range(count):
            weights = [float(k == m) for k in range(count)]
            soup_([part], weights, impl=impl)
            finite = torch.ones(5, 41, dtype=torch.bool, device=device)
            finite[2, 5] = m == count - 1
            assert_same_bits(part.out[finite], part.sources[m][finite])
            assert bool(part.out[~finite].isnan().all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_added_gives_the_base_with_its_zeros(dtype, impl, device):
    part = models((5, 41), 3, dtype=dtype, seed=1, device=device)
    part.base[0, ::2] = -0.0
    nobody = Mask(density=0.0)
    for call in (
        lambda: soup_([part], 0.0, impl=impl),
        lambda: soup_([part], [0.3, -0.4, 0.1], scale=0.0, impl=impl),
        lambda: soup_([Part([], part.base, part.out)], [], impl=impl),
        lambda: merge_([part], Rule("sum", combine="mean"), scale=0.0, impl=impl),
        lambda: merge_([part], Rule(), 0.3, mask=nobody, impl=impl),
        lambda: merge_([part], Rule("sum", combine="weighted_mean"), mask=nobody, impl=impl),
    ):
        part.out.fill_(3.0)
        call()
        assert_same_bits(part.out, part.base)


def test_without_a_base_nothing_is_a_plain_zero(device):
    part = models((5, 41), 3, seed=1, base=False, device=device)
    for impl in IMPLS:
        merge_([part], Rule(), 0.3, mask=Mask(density=0.0), impl=impl)
        assert not bits(part.out).any()


def test_of_two_equal_magnitudes_the_positive_one(device):
    a = torch.tensor([0.5, -0.5, 0.25], device=device)
    for sources in ([a, -a], [-a, a]):
        for impl in IMPLS:
            out = torch.empty(3, device=device)
            merge_([Part(sources, None, out)], Rule(combine="max"), impl=impl)
            assert out.tolist() == [0.5, 0.5, 0.25]


def test_sum_of_no_model(device):
    assert_same_bits(sum_models(torch.empty(0, 4)), torch.full((4,), -0.0))
