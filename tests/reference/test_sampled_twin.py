"""The sampled twin against autograd on the reference rows, in float64."""

from __future__ import annotations

import pytest
import torch

from gemma_ext.reference import cce as reference
from gemma_ext.reference.cce_filter import (
    AUTO_ERROR,
    BREAK_EVEN,
    TAUS,
    auto_tau,
    draws,
    forecast,
    sample,
    sampled_gradients,
)
from gemma_ext.testing import assert_close

HEAD = {"softcap": 5.0, "logit_scale": 0.9, "temperature": 0.8}


def problem(rows: int, width: int, vocab: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(rows, width, generator=g, dtype=torch.float64)
    c = torch.randn(vocab, width, generator=g, dtype=torch.float64)
    bias = torch.randn(vocab, generator=g, dtype=torch.float64)
    targets = torch.randint(0, vocab, (rows,), generator=g)
    targets[1] = -100
    upstream = [torch.randn(rows, generator=g, dtype=torch.float64) for _ in range(3)]
    return e, c, bias, targets, upstream


def exact(e, c, bias, targets, upstream, **head):
    leaves = [x.clone().requires_grad_() for x in (e, c, bias)]
    rows = reference.rows(leaves[0], leaves[1], targets, leaves[2], want_entropy=True, **head)
    total = sum(u * row for u, row in zip(upstream, rows, strict=False))
    return torch.autograd.grad(total.sum(), leaves)


@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "capped"])
@pytest.mark.parametrize("vocab", [1, 255, 256, 700])  # one column, below, at and above a tile
def test_zero_tau_is_exact(head, vocab):
    e, c, bias, targets, upstream = problem(9, 6, vocab, seed=vocab)
    got = sampled_gradients(e, c, targets, *upstream, bias, tau=0.0, **head)
    for ours, want in zip(got[:3], exact(e, c, bias, targets, upstream, **head), strict=True):
        assert_close(ours, want, max_abs=1e-12)
    assert got.kept_fraction == 1.0
    assert not got.weight[1].any()


@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "capped"])
def test_mean_over_seeds_is_exact(head):
    e, c, bias, targets, upstream = problem(9, 6, 1100, seed=5)
    bias = bias * 3
    want = exact(e, c, bias, targets, upstream, **head)
    many = [
        sampled_gradients(e, c, targets, *upstream, bias, tau=0.25, seed=seed, **head)
        for seed in range(100)
    ]
    assert 0.2 < sum(got.kept_fraction for got in many) / 100 < 0.8
    for i, truth in enumerate(want):
        samples = torch.stack([got[i] for got in many])
        error = samples.std(0).norm() / 100**0.5
        assert error > 0.001 * truth.norm()
        assert (samples.mean(0) - truth).norm() < 1.5 * error


def test_weights_of_a_row_add_up_to_what_is_drawn():
    g = torch.Generator().manual_seed(2)
    u = torch.rand(50, 200, generator=g) ** 4
    u[:, ::50] = 1.5
    start = draws(torch.arange(50), torch.randn(50, generator=g), 3)
    weight = sample(u, start, torch.zeros_like(u, dtype=torch.bool))
    drawn = u < 1
    assert (weight[~drawn] == 1).all()
    assert ((weight * u * drawn).sum(1) - (u * drawn).sum(1)).abs().max() < 1


def test_a_taken_strip_leaves_the_phase_alone():
    u = torch.full((1, 8), 0.25)
    taken = torch.zeros_like(u, dtype=torch.bool)
    taken[0, 2] = True
    weight = sample(u, torch.tensor([0]), taken)
    assert weight.tolist() == [[0, 0, 1, 0, 4, 0, 0, 0]]


def test_a_share_of_zero_is_never_kept_and_one_of_nan_is():
    u = torch.tensor([[0.0, float("nan"), 0.0]])
    for start in (0, 2**31, 2**32 - 1):
        weight = sample(u, torch.tensor([start]), torch.zeros_like(u, dtype=torch.bool))
        assert weight.tolist() == [[0, 1, 0]]


def test_scale_is_that_of_the_whole_vocabulary():
    """A shard that does not own the label measures strips against the row's upstream."""
    e, c, bias, targets, upstream = problem(9, 6, 1100, seed=6)
    zero = torch.zeros(9, dtype=torch.float64)
    lost = torch.full_like(targets, -1)
    large = torch.full((9,), 100.0, dtype=torch.float64)
    alone = sampled_gradients(e, c, lost, upstream[0], zero, zero, bias, tau=0.25)
    beside = sampled_gradients(e, c, lost, upstream[0], zero, zero, bias, tau=0.25, scale=large)
    assert beside.kept_fraction < 0.5 * alone.kept_fraction
    silent = sampled_gradients(e, c, lost, upstream[0], zero, zero, bias, tau=0.25, scale=zero)
    assert silent.kept_fraction == 0


@pytest.mark.parametrize("alpha", [0.0, 1.3, 4.0])
def test_auto_takes_the_largest_threshold_that_serves(alpha):
    e, c, bias, targets, _ = problem(40, 6, 3000, seed=7)
    bias = -alpha * torch.arange(1, 3001).double().log()
    targets = targets.clamp(max=20)
    chosen = auto_tau(e, c, targets, bias)
    casts = {tau: forecast(e, c, targets, bias, tau=tau) for tau in TAUS}
    fits = [tau for tau in TAUS if casts[tau].error <= AUTO_ERROR]
    want = fits[0] if fits and casts[fits[0]].kept <= BREAK_EVEN else 0.0
    assert chosen == want
    assert (chosen == 0) == (alpha == 0.0)


def test_no_valid_row_has_a_forecast():
    e, c, bias, targets, _ = problem(4, 6, 300, seed=8)
    targets[:] = -100
    assert forecast(e, c, targets, bias, tau=0.1) == (1.0, 0.0)
