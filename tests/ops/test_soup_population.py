"""Mutation, crossover and swarm steps, and the element rules of single methods."""

from __future__ import annotations

import pytest
import torch
from soup_problem import DEVICES, DTYPES, check_rounded, generator, lattice, models

from gemma_ext.ops.souping import (
    Move,
    Part,
    consensus_,
    crossover_,
    fisher_,
    mutate_,
    nearswap_,
    soup_,
    swarm_,
)
from gemma_ext.reference import random_numbers

pytestmark = pytest.mark.parametrize("device", DEVICES)


def test_mutation_has_its_rate_and_variance(device):
    n, rate, sigma = 1 << 20, 0.1, 0.5
    x = torch.zeros(n, device=device)
    part = Part([x], None, torch.empty(n, device=device), "w")
    mutate_([part], rate, sigma, seed=3)
    found = part.out.double().cpu()
    moved = found != 0
    assert abs(float(moved.double().mean()) - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
    values = found[moved]
    count = len(values)
    assert abs(float(values.mean())) < 4 * sigma / count**0.5
    assert abs(float(values.var()) - sigma**2) < 4 * sigma**2 * (2 / count) ** 0.5
    assert abs(float((values / sigma).pow(4).mean()) - 3) < 4 * (96 / count) ** 0.5
    for bound, tail in ((1.0, 0.317311), (2.0, 0.0455003), (3.0, 0.0026998)):
        beyond = float((values.abs() > bound * sigma).double().mean())
        assert abs(beyond - tail) < 4 * (tail / count) ** 0.5


def test_normal_numbers_are_those_of_the_formula(device):
    n = 100_000
    part = Part([torch.zeros(n, device=device)], None, torch.empty(n, device=device), "w", 7, [5])
    mutate_([part], 1.0, 1.0, seed=9)
    want = random_numbers.normals(random_numbers.random_key(9, "w"), 5, 7, n)
    torch.testing.assert_close(part.out.cpu().double(), want, rtol=3e-6, atol=3e-7)


def test_mutation_of_nothing(device):
    part = models((30, 31), 1, base=False, seed=1, device=device)
    for rate, sigma in ((0.0, 1.0), (1.0, 0.0)):
        mutate_([part], rate, sigma)
        assert torch.equal(part.out, part.sources[0])


def test_mutants_differ(device):
    x = torch.zeros(1000, device=device)
    outs = [torch.empty(1000, device=device) for _ in range(3)]
    parts = [Part([x], None, out, "w", 0, [m]) for m, out in enumerate(outs)]
    mutate_(parts, [0.5, 0.5, 0.5], [1.0, 1.0, 2.0])
    assert not torch.equal(outs[0], outs[1])
    mutate_([Part([x], None, outs[0], "w", 0, [1])], 0.5, 1.0)
    assert torch.equal(outs[0], outs[1])


def test_picked_elements_have_their_shares(device):
    n = 1 << 19
    parents = [torch.full((n,), float(m), device=device) for m in range(3)]
    out = torch.empty(n, device=device)
    weights = [1.0, 3.0, 4.0]
    crossover_([Part(parents, None, out, "w")], weights, seed=2)
    for m, share in enumerate((0.125, 0.375, 0.5)):
        found = float((out == m).double().mean())
        assert abs(found - share) < 4 * (share * (1 - share) / n) ** 0.5


@pytest.mark.parametrize("kind", ["pick", "magnitude"])
def test_picks_are_those_of_the_formula(kind, device):
    part = models((200, 210), 4, base=False, spread=1.0, seed=3, device=device)
    found = []
    for impl in ("auto", "reference"):
        out = torch.empty(200, 210, device=device)
        one = Part(part.sources, None, out, "w")
        crossover_([one], [0.1, 0.2, 0.3, 0.4], kind=kind, seed=4, impl=impl)
        found.append(out)
    assert float((found[0] != found[1]).double().mean()) < 1e-5  # float32 bounds
    stacked = torch.stack([x.float() for x in part.sources])
    assert (stacked == found[0]).any(0).all()


def test_larger_magnitudes_are_picked_more_often(device):
    n = 1 << 18
    parents = [torch.full((n,), v, device=device) for v in (0.5, -2.0)]
    out = torch.empty(n, device=device)
    crossover_([Part(parents, None, out, "w")], 1.0, kind="magnitude", seed=1)
    share = float(torch.tensor([0.5, 2.0]).softmax(0)[1])
    found = float((out == -2.0).double().mean())
    assert abs(found - share) < 4 * (share * (1 - share) / n) ** 0.5


@pytest.mark.parametrize("kind", ["pick", "magnitude", "blend"])
def test_identical_parents_have_identical_children(kind, device):
    one = models((40, 41), 1, base=False, seed=4, device=device)
    part = Part(one.sources * 2, None, one.out, "w")
    crossover_([part], [0.5, 0.5], kind=kind)
    assert torch.equal(one.out, one.sources[0])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.2])
def test_blend(alpha, device):
    part = models((50, 51), 3, base=False, spread=1e-2, seed=5, device=device)
    weights = [1.5, -0.7, 0.2] if alpha < 1 else [0.2, 0.3, 0.5]
    if min(weights) < 0:
        with pytest.raises(ValueError, match="expected weights not to be negative"):
            crossover_([part], weights, kind="blend", alpha=alpha)
        weights = [1.5, 0.7, 0.2]
    crossover_([part], weights, kind="blend", alpha=alpha)
    x = torch.stack([x.cpu().double() for x in part.sources])
    low, high = x.amin(0), x.amax(0)
    want = (torch.tensor(weights).double()[:, None, None] * x).sum(0)
    want = want.clamp(low - alpha * (high - low), high + alpha * (high - low))
    check_rounded(part.out, want, share=0.999)
    if alpha > 1:  # convex weights never reach the bounds
        plain = Part(part.sources, None, torch.empty_like(part.out))
        soup_([plain], weights)
        assert torch.equal(plain.out, part.out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swarm_step(dtype, device):
    g = generator(6)
    x, v, best, top, worst = (
        torch.randn(31, 33, generator=g).to(dtype).to(device) for _ in range(5)
    )
    c = [0.2, 0.3, 0.25, 0.1]
    want_v = (
        c[0] * v.double()
        + c[1] * (best.double() - x.double())
        + c[2] * (top.double() - x.double())
        - c[3] * (worst.double() - x.double())
    )
    want_x = x.double() + 0.5 * want_v
    swarm_([Move(x, v, best, top, worst, "w")], c, 0.5)
    tolerance = (
        {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 0.02}
    )
    torch.testing.assert_close(v.double(), want_v, **tolerance)
    torch.testing.assert_close(x.double(), want_x, **tolerance)


def test_swarm_steps_that_are_known(device):
    g = generator(7)
    x, v, best, top, worst = (torch.randn(100, generator=g).to(device) for _ in range(5))
    before, goal = v.clone(), top.clone()
    swarm_([Move(x.clone(), v, best, top, worst)], [1.0, 0.0, 0.0, 0.0], 1.0)
    assert torch.equal(v, before)
    start = x.clone()
    swarm_([Move(x, v, best, top, worst)], [0.0, 0.0, 1.0, 0.0], 1.0)
    torch.testing.assert_close(x, goal, rtol=0, atol=4e-7 * float((start - goal).abs().max()))


def test_several_particles(device):
    g = generator(8)
    tensors = [[torch.randn(5 + t, generator=g).to(device) for _ in range(5)] for t in range(4)]
    alone = [[y.clone() for y in five] for five in tensors]
    c = torch.rand(4, 4, generator=g)
    swarm_([Move(*five, name=str(t)) for t, five in enumerate(tensors)], c, [1.0, 0.5, 2.0, 0.0])
    for t, five in enumerate(alone):
        step = [1.0, 0.5, 2.0, 0.0][t]
        swarm_([Move(*five, name=str(t))], c[t].tolist(), step)
        assert torch.equal(five[0], tensors[t][0])
        assert torch.equal(five[1], tensors[t][1])


def test_consensus(device):
    part = lattice((31, 37), 3, seed=9, device=device)
    delta = torch.stack([(x - part.base).cpu().double() for x in part.sources])
    total = delta.sum(0)
    lambdas = [0.25, 0.5, 1.0]
    uses = torch.stack(
        [d.abs() > w * (total - d).abs() for d, w in zip(delta, lambdas, strict=True)]
    )
    for votes in (1, 2, 3):
        consensus_([part], lambdas, votes=votes, scale=0.5)
        want = part.base.cpu().double() + torch.where(uses.sum(0) >= votes, 0.5 * total, 0.0)
        check_rounded(part.out, want, share=1.0)
    for task in range(3):
        consensus_([part], lambdas, task=task)
        want = part.base.cpu().double() + torch.where(uses[task], total, 0.0)
        check_rounded(part.out, want, share=1.0)


def test_consensus_of_identical_models(device):
    """|d| > lambda (M - 1) |d| holds everywhere or nowhere."""
    one = lattice((20, 20), 1, seed=10, device=device)
    part = Part(one.sources * 4, one.base, one.out)
    consensus_([part], 0.25)
    assert torch.equal(one.out, one.base + 4 * (one.sources[0] - one.base))
    consensus_([part], 0.5)
    assert torch.equal(one.out, one.base)


@pytest.mark.parametrize("base", [True, False], ids=["base", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fisher(base, dtype, device):
    part = models((29, 31), 3, dtype=dtype, base=base, seed=11, device=device)
    g = generator(12)
    f = [torch.rand(29, 31, generator=g).to(device) for _ in range(3)]
    c, floor, add = [0.5, 1.0, 2.0], [0.3, 0.0, 0.0], 1e-3
    fisher_([part], [f], c, floor=floor, add=add)
    weight = [c[m] * (f[m].cpu().double().clamp(min=floor[m]) + add) for m in range(3)]
    above = sum(w * x.cpu().double() for w, x in zip(weight, part.sources, strict=True))
    check_rounded(part.out, above / sum(weight), share=0.999)


def test_equal_fishers_are_a_soup(device):
    part = models((29, 31), 3, dtype=torch.float32, seed=13, device=device)
    f = torch.rand(29, 31, device=device) + 0.1
    fisher_([part], [[f, f, f]], [1.0, 2.0, 5.0])
    want = torch.empty_like(part.out)
    soup_([Part(part.sources, None, want)], [0.125, 0.25, 0.625])
    torch.testing.assert_close(part.out, want, rtol=1e-5, atol=1e-8)


def test_fishers_of_nothing(device):
    part = models((5, 6), 2, dtype=torch.float32, seed=14, device=device)
    zero = torch.zeros(5, 6, device=device)
    fisher_([part], [[zero, zero]])
    assert torch.equal(part.out, part.base)
    plain = Part(part.sources, None, part.out)
    fisher_([plain], [[zero, zero]], [1.0, 3.0])
    want = 0.25 * part.sources[0].double() + 0.75 * part.sources[1].double()
    torch.testing.assert_close(part.out.double(), want, rtol=1e-6, atol=1e-9)


def test_masks_for_fishers_are_a_stitch(device):
    part = lattice((11, 13), 2, seed=15, device=device)
    g = generator(16)
    masks = [torch.randint(0, 2, (11, 13), generator=g).float().to(device) for _ in range(2)]
    fisher_([part], [masks])
    count = masks[0] + masks[1]
    mixed = sum(m * (x - part.base) for m, x in zip(masks, part.sources, strict=True))
    assert torch.equal(part.out, part.base + mixed / count.clamp(min=1))


@pytest.mark.parametrize("t", [0.0, 1e-4, 1e-3, 1.0])
def test_nearswap(t, device):
    part = models((41, 43), 1, seed=17, device=device)
    nearswap_([part], t)
    a, b = part.base.cpu().double(), part.sources[0].cpu().double()
    w = (t / (a - b).abs().clamp(min=1e-6)).clamp(0, 1)
    check_rounded(part.out, w * b + (1 - w) * a, share=0.999)
    if t == 0:
        assert torch.equal(part.out, part.base)
    if t == 1:
        assert torch.equal(part.out, part.sources[0])


def test_nan_reaches_every_result(device):
    x = torch.tensor([torch.nan, 1.0, 2.0], device=device)
    y, base = torch.ones(3, device=device), torch.zeros(3, device=device)
    out = torch.empty(3, device=device)
    calls = [
        lambda: consensus_([Part([x, y], base, out)], 0.5),
        lambda: fisher_([Part([x, y], base, out)], [[y, y]]),
        lambda: nearswap_([Part([x], base, out)], 0.5),
        lambda: mutate_([Part([x], None, out)], 0.0, 1.0),
        lambda: crossover_([Part([x, y], None, out)], 0.5, kind="blend"),
    ]
    for call in calls:
        out.zero_()
        call()
        assert out.isnan().cpu().tolist() == [True, False, False]
