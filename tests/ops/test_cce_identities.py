"""What the mathematics promises for any inputs, with no reference needed."""

from __future__ import annotations

import itertools

import pytest
import torch
from cce_oracle import IGNORE, Problem, assert_close, problem, run

CAPS = [None, 6.0]


@pytest.mark.parametrize("softcap", CAPS)
def test_euler_identity(impl, softcap):
    """<dE, E> = <dC, C>: both are sum_iv dA_iv E_i . C_v, whatever bias and cap do to dA."""
    p = problem(70, 40, 900, seed=1)
    _, grads = run(impl.loss, p, softcap=softcap, z_loss=0.1)
    left = (grads["e"].double() * p.e.double()).sum()
    right = (grads["c"].double() * p.c.double()).sum()
    size = (grads["e"].double() * p.e.double()).abs().sum()
    assert abs(left - right) < 1e-6 * size


@pytest.mark.parametrize("bias", [False, True])
def test_uncapped_gradients_sum_to_zero_over_the_vocabulary(impl, bias):
    p = problem(70, 40, 900, bias=bias, seed=2)
    _, grads = run(impl.loss, p, reduction="sum")
    assert grads["c"].double().sum(0).abs().max() < 1e-5 * grads["c"].abs().sum(0).max()
    if bias:
        assert abs(grads["bias"].double().sum()) < 1e-5 * grads["bias"].abs().sum()


def test_z_loss_column_sum(impl):
    """sum_v G_iv = 2 lambda lse_i: uncapped, sum_v dC_v = sum_i 2 lambda lse_i E_i."""
    p = problem(30, 20, 500, seed=3)
    leaves = p.leaves()
    out, _ = run(impl.loss, p, return_lse=True)
    _, grads = run(impl.loss, p, reduction="sum", z_loss=0.2)
    want = (0.4 * out.lse.detach().double()[:, None] * leaves["e"].detach().double()).sum(0)
    assert_close(grads["c"].double().sum(0), want, rtol=2e-5)
    assert_close(grads["bias"].double().sum(), 0.4 * out.lse.detach().double().sum(), rtol=2e-5)


def test_constant_added_to_the_bias_changes_nothing_uncapped(impl):
    p = problem(30, 20, 500, seed=4)
    moved = Problem(p.e, p.c, p.targets, p.bias + 3.0)
    (a, ga), (b, gb) = run(impl.loss, p), run(impl.loss, moved)
    assert_close(a, b.double(), rtol=2e-6)
    for name in ga:
        assert_close(ga[name], gb[name].double(), rtol=2e-5, what=name)


@pytest.mark.parametrize("softcap", CAPS)
def test_permuting_the_vocabulary_permutes_its_gradient(impl, softcap):
    p = problem(40, 20, 700, seed=5)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(6))
    where = torch.empty_like(order)
    where[order] = torch.arange(700)
    q = Problem(p.e, p.c[order], where[p.targets], p.bias[order])
    (a, ga), (b, gb) = (run(impl.loss, x, softcap=softcap) for x in (p, q))
    assert_close(a, b.double(), rtol=2e-6)
    assert_close(ga["e"], gb["e"].double(), rtol=2e-5)
    assert_close(ga["c"][order], gb["c"].double(), rtol=2e-5)
    assert_close(ga["bias"][order], gb["bias"].double(), rtol=2e-5)


def test_sum_is_additive_over_tokens(impl):
    p = problem(50, 20, 600, ignored=0.2, seed=7)
    parts = [
        run(impl.loss, Problem(p.e[i], p.c, p.targets[i], p.bias), reduction="sum", softcap=5.0)
        for i in (slice(0, 1), slice(1, 20), slice(20, 50))
    ]
    whole, grads = run(impl.loss, p, reduction="sum", softcap=5.0)
    assert_close(sum(x[0] for x in parts), whole.double(), rtol=1e-6)
    assert_close(sum(x[1]["c"] for x in parts), grads["c"].double(), rtol=1e-5)
    assert_close(torch.cat([x[1]["e"] for x in parts]), grads["e"].double(), rtol=1e-5)


@pytest.mark.parametrize("bounds", [[0, 700], [0, 256, 512, 700], [0, 1, 699, 700], [0, 300, 700]])
def test_vocabulary_shards_combine(impl, bounds):
    """L = logsumexp of the shards' lse; the target logit is the sum of lse - nll over shards."""
    p = problem(40, 20, 700, ignored=0.2, seed=8)
    valid = p.targets != IGNORE
    leaves = p.leaves()
    lse, target = [], torch.zeros(40)
    for lo, hi in itertools.pairwise(bounds):
        local = torch.where(valid, p.targets - lo, IGNORE)
        # A label owned by another shard must not fall on ignore_index by accident.
        local = torch.where(valid & ((local < 0) | (local >= hi - lo)), hi - lo, local)
        rows = impl.rows(
            leaves["e"],
            leaves["c"][lo:hi],
            local,
            leaves["bias"][lo:hi],
            softcap=6.0,
            logit_scale=1.0,
            temperature=1.0,
            ignore_index=IGNORE,
            class_weight=None,
            want_entropy=False,
            want_argmax=False,
            missing_target="none",
        )
        lse.append(rows.lse)
        target = target + (rows.lse - rows.nll)
    nll = torch.where(valid, torch.logsumexp(torch.stack(lse), 0) - target, 0.0)
    loss = nll.sum() / valid.sum()
    got = torch.autograd.grad(loss, list(leaves.values()))
    want, grads = run(impl.loss, p, softcap=6.0)
    assert_close(loss, want.double(), rtol=2e-6)
    for name, grad in zip(leaves, got, strict=True):
        assert_close(grad, grads[name].double(), rtol=4e-5, what=f"d{name}")


def test_a_far_cap_is_no_cap(impl):
    """s = a (1 - (a / cap)^2 / 3 + ...): the loss moves by no more than max |a|^3 / (3 cap^2)."""
    p = problem(30, 20, 500, seed=9)
    plain, _ = run(impl.loss, p)
    top = (p.e @ p.c.T + p.bias).abs().max().item()
    for cap in (1e2, 1e3, 1e4):
        capped, _ = run(impl.loss, p, softcap=cap)
        assert abs(capped - plain) <= 2 * top**3 / (3 * cap**2) + 2e-6 * plain


def test_temperature_is_a_scale_when_uncapped(impl):
    p = problem(30, 20, 500, bias=False, seed=10)
    (a, ga), (b, gb) = run(impl.loss, p, temperature=1.6), run(impl.loss, p, logit_scale=1 / 1.6)
    assert_close(a, b.double(), rtol=2e-6)
    for name in ga:
        assert_close(ga[name], gb[name].double(), rtol=2e-5, what=name)


def test_loss_is_never_negative(impl):
    """nll = lse - s_y >= 0 needs both from the same logits (D = 2304 with bias in chunks fails)."""
    for spread in (0.1, 3.0, 30.0):
        p = problem(64, 2304, 300, spread=spread, seed=11)
        nll = impl.loss(p.e, p.c, p.targets, bias=p.bias, softcap=30.0, reduction="none")
        assert nll.min() >= -1e-5
