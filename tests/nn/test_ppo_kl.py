"""Estimators of a KL divergence and the coefficient of its penalty."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_ext.nn.ppo import KL_ESTIMATORS, AdaptiveKL, FixedKL, full_kl, kl_estimate
from gemma_ext.nn.ppo.kl import VERL_LIMITS

LOGP = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
REF = torch.tensor([-1.2, -1.5, -0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [0.2, -0.5, 0]),
        ("k2", [0.02, 0.125, 0]),
        ("k3", [0.0187308, 0.1487213, 0]),
        ("abs", [0.2, 0.5, 0]),
    ],
)
def test_by_hand(kind, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    for name in (kind, f"{kind}+"):
        if name in KL_ESTIMATORS:
            torch.testing.assert_close(kl_estimate(LOGP, REF, name), expected, atol=5e-8, rtol=0)


@given(st.floats(-30, 30), st.floats(-30, 30))
@settings(deadline=None)
def test_k3_is_not_negative(a, b):
    assert kl_estimate(torch.tensor(a), torch.tensor(b), "k3") >= 0


def test_expectations_over_the_vocabulary_are_the_divergence():
    logp, ref = torch.randn(2, 5, 17, dtype=torch.float64).log_softmax(-1)
    exact = full_kl(logp, ref)
    for kind in ("k1", "k3"):
        torch.testing.assert_close((logp.exp() * kl_estimate(logp, ref, kind)).sum(-1), exact)
    torch.testing.assert_close(
        exact, torch.nn.functional.kl_div(ref, logp, log_target=True, reduction="none").sum(-1)
    )


def test_gradients_in_expectation():
    """Only k2, and so every "+", has the gradient of the divergence under pi (detached)."""
    z = torch.randn(11, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(11, dtype=torch.float64).log_softmax(-1)

    def gradient(loss):
        return torch.autograd.grad(loss, z)[0]

    logp = z.log_softmax(-1)
    exact = gradient(full_kl(logp, ref))
    share = logp.detach().exp()
    means = {}
    for kind in KL_ESTIMATORS:
        means[kind] = gradient((share * kl_estimate(z.log_softmax(-1), ref, kind)).sum())
    for kind in ("k2", "k1+", "k3+"):
        torch.testing.assert_close(means[kind], exact)
    assert means["k1"].abs().max() < 1e-12
    torch.testing.assert_close(means["k3"], gradient(full_kl(ref, z.log_softmax(-1))))


def test_zero_probabilities_cost_nothing():
    logp = torch.tensor([[0.0, float("-inf")]])
    assert full_kl(logp, torch.tensor([[0.5, 0.5]]).log()).item() == pytest.approx(0.6931472)
    same = torch.randn(3, 8).log_softmax(-1).requires_grad_()
    full_kl(same, same.detach()).sum().backward()
    assert full_kl(same, same.detach()).abs().max() == 0


def test_limits_are_verls():
    far = torch.tensor([-50.0, 3.0])
    near = torch.zeros(2)
    assert kl_estimate(far, near, "k3", limits=VERL_LIMITS).tolist() == pytest.approx(
        [10, 2.0497871]
    )
    assert kl_estimate(far, near, "k1", limits=VERL_LIMITS).tolist() == [-50, 3]


def test_unknown_kind():
    for kind in ("full", "k2+", "kl"):
        with pytest.raises(
            ValueError, match=f"kind to be one of k1, k2.*got '{kind}'".replace("+", r"\+")
        ):
            kl_estimate(LOGP, REF, kind)


def test_fixed_coefficient():
    control = FixedKL(0.05)
    assert control.update(100.0, 512) == 0.05
    other = FixedKL(1.0)
    other.load_state_dict(control.state_dict())
    assert other.coef == 0.05


def test_adaptive_coefficient():
    control = AdaptiveKL(0.1, target=6.0)
    assert control.update(6.6, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert control.update(600.0, 10_000) == pytest.approx(0.101 * 1.2)
    assert control.update(0.0, 10_000) == pytest.approx(0.101 * 1.2 * 0.8)
    assert control.update(float("nan"), 10_000) == control.coef
    resumed = AdaptiveKL(9.0, target=6.0)
    resumed.load_state_dict(control.state_dict())
    assert resumed.update(5.0, 64) == control.update(5.0, 64)


def test_adaptive_coefficient_settles_where_the_target_is():
    control = AdaptiveKL(1.0, target=2.0, horizon=100)
    for _ in range(2000):
        control.update(1.0 / control.coef, 10)
    assert control.coef == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("name", ["target", "horizon", "limit"])
def test_adaptive_arguments(name):
    with pytest.raises(ValueError, match=f"expected {name} to be positive, got 0"):
        AdaptiveKL(0.1, **{"target": 6.0, name: 0})
