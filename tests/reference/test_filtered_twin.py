"""The filtered twin against autograd on the reference rows, in float64."""

from __future__ import annotations

import pytest
import torch

from gemma_ext.reference import cce as reference
from gemma_ext.reference.cce_filter import auto_eps, filtered_gradients
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
def test_zero_eps_is_exact(head, vocab):
    e, c, bias, targets, upstream = problem(9, 6, vocab, seed=vocab)
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(1))
    f = filtered_gradients(e, c, targets, *upstream, bias, eps=0.0, order=order, **head)
    for got, want in zip(f[:3], exact(e, c, bias, targets, upstream, **head), strict=True):
        assert_close(got, want, max_abs=1e-12)
    assert f.kept_fraction == 1.0
    assert not f.keep[1].any()
    assert f.dropped_mass.abs().max() == 0


def test_error_and_kept_fraction_follow_eps():
    e, c, bias, targets, upstream = problem(60, 16, 3000, seed=3)
    want = exact(e, c, bias, targets, upstream)
    kept, errors = [], []
    for k in (14, 11, 8, 6):
        f = filtered_gradients(e, c, targets, *upstream, bias, eps=2.0**-k, compensate=False)
        kept.append(f.kept_fraction)
        errors.append(float((f.de - want[0]).norm() / want[0].norm()))
    assert kept == sorted(kept, reverse=True)
    assert errors == sorted(errors)
    assert kept[-1] < kept[0]


def test_plain_filter_loses_exactly_the_dropped_mass():
    """Without a cap, sum_v of a row's gradient is 0; the plain filter leaves -A * dropped mass."""
    e, c, bias, targets, _ = problem(60, 8, 3000, seed=4)
    ones = torch.ones(60, dtype=torch.float64)
    plain = filtered_gradients(e, c, targets, ones, bias=bias, eps=2.0**-7, compensate=False)
    assert plain.dropped_mass.sum() > 0
    assert_close(plain.dbias.sum(), -plain.dropped_mass.sum(), max_abs=1e-10)
    whole = filtered_gradients(e, c, targets, ones, bias=bias, eps=2.0**-7)
    assert_close(whole.dbias.sum(), torch.zeros((), dtype=torch.float64), max_abs=1e-10)


def test_compensation_restores_push_down_at_random_initialisation():
    """Near-uniform rows drop every tile without the target; tile means give most of it back."""
    g = torch.Generator().manual_seed(5)
    e = torch.randn(64, 16, generator=g, dtype=torch.float64) * 0.05
    c = torch.randn(4096, 16, generator=g, dtype=torch.float64) * 0.2
    targets = torch.randint(0, 4096, (64,), generator=g)
    d = torch.full((64,), 1 / 64, dtype=torch.float64)
    zeros = torch.zeros_like(d)
    want = exact(e, c, torch.zeros(4096, dtype=torch.float64), targets, [d, zeros, zeros])[1]
    errors = {}
    for compensate in (False, True):
        f = filtered_gradients(e, c, targets, d, eps=2.0**-10, compensate=compensate)
        untouched = torch.ones(4096, dtype=torch.bool)
        untouched[targets] = False
        errors[compensate] = float((f.dc - want)[untouched].norm() / want[untouched].norm())
    assert errors[False] > 0.5
    assert errors[True] < 0.1


def test_one_loud_row_leaves_the_others_alone():
    """The threshold follows each row: 1e4 on one row changes no other row's decisions."""
    e, c, bias, targets, _ = problem(40, 8, 2000, seed=6)
    d = torch.ones(40, dtype=torch.float64)
    quiet = filtered_gradients(e, c, targets, d, bias=bias, eps=2.0**-9)
    d[7] = 1e4
    loud = filtered_gradients(e, c, targets, d, bias=bias, eps=2.0**-9)
    others = torch.arange(40) != 7
    assert torch.equal(quiet.keep[others], loud.keep[others])
    assert loud.keep[7].sum() >= quiet.keep[7].sum()


def test_z_loss_of_a_confident_row_survives():
    """p_target > 1 - eps: the published test on |p - onehot| would drop the whole row."""
    e = torch.zeros(2, 4, dtype=torch.float64)
    e[:, 0] = 40.0
    c = torch.zeros(600, 4, dtype=torch.float64)
    c[5, 0] = 1.0
    targets = torch.tensor([5, 5])
    d_nll = torch.ones(2, dtype=torch.float64)
    d_lse = torch.full((2,), 0.5, dtype=torch.float64)
    f = filtered_gradients(e, c, targets, d_nll, d_lse, eps=2.0**-12)
    assert_close(f.dc[5], 0.5 * e.sum(0), rel=1e-9)


def test_masked_columns_stay_finite():
    """bias = -inf over whole tiles, as vocabulary padding uses it."""
    e, c, bias, targets, upstream = problem(20, 8, 1024, seed=8)
    bias[300:] = -torch.inf
    targets = targets.clamp(max=299)
    for eps in (0.0, 2.0**-8):
        f = filtered_gradients(e, c, targets, *upstream, bias, eps=eps)
        assert all(torch.isfinite(x).all() for x in f[:3])
        assert torch.count_nonzero(f.dc[512:]) == 0  # the tile that holds 300 spreads its mass


def test_auto_eps():
    def row(tail: float, count: int, tiles: int) -> torch.Tensor:
        """0.3 in one strip, `tail` in `count` others, the rest on the label 0."""
        p = torch.full((1, tiles * 256), 1e-12, dtype=torch.float64)
        p[0, 256] = 0.3
        p[0, 512::256][:count] = tail
        p[0, 0] = 0.7 - count * tail
        return p.log()

    # energy about 2 * 0.3^2, noise count * tail^2: 46 strips of 2^-13 reach an error of 2^-9
    label = torch.zeros(1, dtype=torch.long)
    assert auto_eps(row(1.01 * 2.0**-13, 40, 200), label) == 2.0**-10
    assert auto_eps(row(1.01 * 2.0**-13, 60, 200), label) == 2.0**-13
    assert auto_eps(row(1.01 * 2.0**-13, 60, 70), label) is None
    assert auto_eps(row(2.0**-16, 4500, 4600), label) is None
