"""Every rule on a batch worked out by hand, and what holds for any batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import tensor

from gemma_ext.papers.reward_shaping import RULES, RewardShaper, Shaping, rules

R = [1, 2.5, -0.5, 4]
Q = [[0, 1], [1, 3], [-1, 0.5], [2, 2]]
KNOWN = {
    "par": [0.61552929, 0.59755757, 0.44570038, 0.88079708],
    "par-k2": [0.69039854, 0.61075777, 0.42513075, 0.98201379],
    "par-k3": [0.72628706, 0.58571929, 0.43250017, 0.99752738],
    "tanh": [0.38079708, 0.22151555, -0.14973850, 0.96402758],
    "centred": [0.5, 0.5, -0.25, 2],
    "sgfc": [0.08331440, 0.10586888, 0.04692219, 0.26894142],
    "polynomial": [0.60943013, 0.59869787, 0.44713698, 0.88301514],
    "lsc": [-0.81635074, -1.28833778, -1.57996382, -0.12692925],
}
RELATIVE = ("par", "tanh", "polynomial", "centred", "lsc", "sgfc", "quantile")


def double(values):
    return tensor(values, dtype=torch.float64)


def shaped(name, r, q, **changes):
    return RewardShaper(Shaping.named(name, **changes))(r, q)


@pytest.mark.parametrize("name", KNOWN)
def test_known_batch(name):
    rule, _, k = name.partition("-k")
    found = shaped(rule, double(R), double(Q), k=float(k or 1))
    torch.testing.assert_close(found, double(KNOWN[name]), atol=1e-8 / 2 + 1e-9, rtol=0)


def test_quantile_of_the_references_that_lsc_centres_on():
    found = rules.normal_quantile(double(Q))
    expected = double([1.23287944, 3.46574852, 0.84931398, 2.00001036])
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)


def test_the_mean_of_sigmoids_is_not_the_sigmoid_of_the_mean():
    par = rules.sigmoid(double(R), double(Q))
    trap = torch.sigmoid(double(R) - double(Q).mean(1))
    assert abs(float(trap[0]) - 0.62245933) < 1e-8
    assert abs(float(par[0] - trap[0])) > 5e-3
    assert float(par[3]) == float(trap[3])  # its references are equal


def test_uncentred_rules():
    r = double(R)
    off = {"relative": False}
    torch.testing.assert_close(shaped("sigmoid", r, None, k=2), torch.sigmoid(2 * r))
    torch.testing.assert_close(shaped("tanh", r, None, **off), torch.tanh(r))
    torch.testing.assert_close(shaped("polynomial", r, None, **off), rules.polynomial(r))


def test_polynomial_is_the_least_squares_fit_and_its_edges_are_known():
    x = np.linspace(-5, 5, 100)
    fit = np.polyfit(x, 1 / (1 + np.exp(-x)), 5)
    a, b, c, d = rules.POLYNOMIAL
    np.testing.assert_allclose(fit, [a, 0, b, 0, c, d], rtol=1e-11, atol=1e-14)
    dense = torch.linspace(-4.999999, 4.999999, 20001, dtype=torch.float64)
    found = rules.polynomial(dense)
    assert (found.diff() > 0).all()
    assert abs(float(found[0]) + 0.01092) < 1e-5
    assert abs(float(found[-1]) - 1.01092) < 1e-5
    assert abs(float((found - dense.sigmoid()).abs().max()) - 0.0176) < 1e-4
    assert rules.polynomial(double([-5, 5, -9, 9])).tolist() == [0, 1, 0, 1]


def test_length_penalty():
    found = rules.penalised(double([2, 2, 2]), tensor([350, 300, 1]))
    assert found.tolist() == [1.5, 2, 2]


def batch(seed, rows=17, references=5):
    generator = torch.Generator().manual_seed(seed)
    r = 2 * torch.randn(rows, generator=generator, dtype=torch.float64)
    return r, 2 * torch.randn(rows, references, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_rule_is_monotone_in_the_score(name, seed):
    r, q = batch(seed)
    q = q[:1].expand(len(r), -1)  # one prompt
    found = shaped(name, r, q, **({"ceil": 1.0} if name == "ceil" else {}))
    assert (found[r.argsort()].diff() >= -1e-15).all()


@pytest.mark.parametrize("name", RELATIVE)
def test_a_shift_of_the_reward_model_changes_nothing(name):
    r, q = batch(3)
    torch.testing.assert_close(
        shaped(name, r + 7.25, q + 7.25), shaped(name, r, q), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("name", ["vanilla", "sigmoid", "ceil"])
def test_rules_without_references_move_with_the_reward_model(name):
    r, q = batch(3)
    assert (shaped(name, r + 7.25, q + 7.25) - shaped(name, r, q)).abs().max() > 0.1


def test_bounds():
    edge = tensor([-16.0, 16.0])
    found = shaped("par", edge, torch.zeros(2, 1))
    assert found.dtype == torch.float32
    assert 0 < found[0] < found[1] < 1
    r, q = batch(5)
    assert (shaped("lsc", 50 * r, q) <= 0).all()
    assert shaped("tanh", r, q).abs().max() < 1
    assert shaped("polynomial", 9 * r, q).min() >= -0.011
    assert shaped("polynomial", 9 * r, q).max() <= 1.011
    assert float(shaped("par", r, q).var(correction=0)) <= 0.25  # Popoviciu


def test_symmetry_of_one_reference_and_order_of_several():
    r, q = batch(6)
    a, b = r, q[:, 0]
    torch.testing.assert_close(
        rules.sigmoid(a, b[:, None]) + rules.sigmoid(b, a[:, None]), torch.ones_like(a)
    )
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    for name in RELATIVE:
        torch.testing.assert_close(shaped(name, r, q[:, order]), shaped(name, r, q))


@pytest.mark.parametrize("k", [0.3, 1.0, 20.0])
def test_a_draw_from_the_references_own_distribution_is_worth_one_half(k):
    # exact over all pairs of a distribution on points: antisymmetry
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(40, generator=generator, dtype=torch.float64)
    share = torch.rand(40, generator=generator, dtype=torch.float64)
    share /= share.sum()
    values = rules.sigmoid(points.repeat_interleave(40), points.repeat(40)[:, None], k=k)
    expected = (share.repeat_interleave(40) * share.repeat(40) * values).sum()
    assert abs(float(expected) - 0.5) < 1e-12


def test_slope_spans_the_quantile_and_the_linear_rule():
    r, q = batch(8)
    torch.testing.assert_close(rules.sigmoid(r, q, k=1e6), rules.quantile(r, q), atol=1e-12, rtol=0)
    k = 1e-4
    torch.testing.assert_close(
        4 / k * (rules.sigmoid(r, q, k=k) - 0.5), rules.centred(r, q), atol=1e-6, rtol=0
    )
    assert rules.quantile(double([1.0]), double([[0, 1, 2, 0.5]])).tolist() == [0.625]


def test_tanh_is_par_of_slope_two_in_another_scale():
    r, q = batch(9)
    torch.testing.assert_close(rules.tanh(r, q), 2 * rules.sigmoid(r, q, k=2) - 1)


def test_gradient_in_the_score():
    r, q = batch(10)
    r.requires_grad_()
    rules.sigmoid(r, q, k=2.5).sum().backward()
    s = torch.sigmoid(2.5 * (r.detach()[:, None] - q))
    torch.testing.assert_close(r.grad, (2.5 * s * (1 - s)).mean(1))
    for f in (rules.tanh, rules.polynomial, rules.centred, rules.lsc, rules.sgfc):
        assert torch.autograd.gradcheck(lambda x, f=f: f(x, q), r)


def test_masked_references_have_no_gradient_whatever_they_hold():
    r, q = batch(12)
    mask = torch.ones_like(q, dtype=torch.bool)
    mask[0, 2:] = False
    poisoned = torch.where(mask, q, math.nan)
    r.requires_grad_()
    for f in (rules.sigmoid, rules.tanh, rules.polynomial, rules.centred, rules.lsc, rules.sgfc):
        (found,) = torch.autograd.grad(f(r, poisoned, mask).sum(), r)
        (first,) = torch.autograd.grad(f(r[:1], q[:1, :2]).sum(), r)
        torch.testing.assert_close(found[:1], first[:1])
        assert torch.isfinite(found).all()


def test_masked_references_do_not_count_whatever_they_hold():
    r, q = batch(11)
    mask = torch.rand(q.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[:, :2] = True
    poisoned = torch.where(mask, q, math.nan)
    for name in RELATIVE:
        rows = [shaped(name, r[i : i + 1], q[i : i + 1, mask[i]])[0] for i in range(len(r))]
        found = RewardShaper(name)(r, poisoned, mask=mask)
        torch.testing.assert_close(found, torch.stack(rows))
        lists = [row[keep].tolist() for row, keep in zip(q, mask, strict=True)]
        torch.testing.assert_close(RewardShaper(name)(r, lists), found)
