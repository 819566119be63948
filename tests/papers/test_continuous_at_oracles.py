"""Steps, balls and losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gemma_ext.papers.continuous_at import AttackConfig, TrainConfig
from gemma_ext.papers.continuous_at.losses import cut, floored, ipo
from gemma_ext.papers.continuous_at.steps import STEPS, Stepper, boundary, project

HEAD = torch.tensor([[1, 0.5], [-0.5, 1], [0.2, -1.5]], dtype=torch.float64)
TOKENS = torch.tensor([[0.3, -0.2], [0.1, 0.4], [-0.2, 0.1]], dtype=torch.float64)
RATE, RADIUS = 0.05, 0.06


def toy_loss(delta):
    """Cross-entropy of class 1 under logits U sum_i (X_i + d_i); token 2 is not moved."""
    states = TOKENS + torch.cat([delta, torch.zeros(1, 2, dtype=torch.float64)])
    logits = HEAD @ states.sum(0)
    return torch.nn.functional.cross_entropy(logits, torch.tensor(1))


def descend(kind, steps):
    delta, stepper, path = torch.zeros(2, 2, dtype=torch.float64), Stepper(kind), []
    for _ in range(steps):
        here = delta.clone().requires_grad_()
        (grad,) = torch.autograd.grad(toy_loss(here), here)
        delta = project(delta - RATE * stepper.direction(grad), RADIUS)
        path.append((delta, float(toy_loss(delta))))
    return path


def test_the_clean_toy():
    logits = HEAD @ TOKENS.sum(0)
    assert torch.allclose(logits, torch.tensor([0.35, 0.2, -0.41], dtype=torch.float64))
    assert float(toy_loss(torch.zeros(2, 2, dtype=torch.float64))) == pytest.approx(
        0.9951703432, abs=1e-10
    )


def test_sign_is_on_the_ball_after_one_step_and_stays():
    path = descend("sign", 3)
    for delta, loss in path:
        expected = torch.tensor([-0.04242641, 0.04242641], dtype=torch.float64)
        assert torch.allclose(delta, expected.expand(2, 2), atol=1e-8)
        assert loss == pytest.approx(0.8732314243, abs=1e-10)


@pytest.mark.parametrize(
    ("step", "expected", "norm", "loss"),
    [
        (1, (-0.03691722, 0.03372119), 0.05, 0.8925983786),
        (2, (-0.04469400, 0.04003057), 0.06, 0.8729603909),
        (3, (-0.04493051, 0.03976492), 0.06, 0.8729535368),
    ],
)
def test_l2norm_follows_the_gradient(step, expected, norm, loss):
    delta, found = descend("l2norm", step)[-1]
    assert torch.allclose(delta[0], torch.tensor(expected, dtype=torch.float64), atol=1e-8)
    assert float(delta[0].norm()) == pytest.approx(norm, abs=1e-12)
    assert found == pytest.approx(loss, abs=1e-10)


def test_rms_is_l2norm_as_long_as_sign():
    grad = torch.randn(7, 5, dtype=torch.float64)
    rms, sign, unit = (Stepper(kind).direction(grad) for kind in ("rms", "sign", "l2norm"))
    assert torch.allclose(rms.norm(dim=1), sign.norm(dim=1))
    assert torch.allclose(rms, unit * 5**0.5)
    assert torch.equal(Stepper("l2norm").direction(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_adam_is_torchs_and_forgets_rows_that_leave():
    grads = [torch.randn(4, 3) for _ in range(4)]
    theirs = torch.zeros(4, 3, requires_grad=True)
    optimiser = torch.optim.Adam([theirs], lr=0.1)
    ours, stepper = torch.zeros(4, 3), Stepper("adam")
    for grad in grads[:3]:
        theirs.grad = grad.clone()
        optimiser.step()
        ours = ours - 0.1 * stepper.direction(grad)
    assert torch.allclose(ours, theirs.detach(), atol=1e-6)
    kept = torch.tensor([True, False, True, False])
    stepper.keep(kept)
    theirs.grad = grads[3].clone()
    optimiser.step()
    ours = ours[kept] - 0.1 * stepper.direction(grads[3][kept])
    assert torch.allclose(ours, theirs.detach()[kept], atol=1e-6)


def test_projection_is_per_token_and_leaves_the_inside_alone():
    delta = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    found = project(delta, 1.0)
    assert torch.allclose(found[0], torch.tensor([0.6, 0.8]))
    assert torch.equal(found[1:], delta[1:])
    assert torch.equal(project(delta, math.inf), delta)
    assert torch.equal(project(delta, 0.0), torch.zeros(3, 2))
    radii = torch.tensor([1.0, 0.25, 1.0])
    assert torch.allclose(project(delta, radii).norm(dim=1), torch.tensor([1.0, 0.25, 0.0]))
    assert boundary(project(delta, radii), radii) == pytest.approx(2 / 3)
    assert boundary(torch.zeros(0, 2), 1.0) == 0.0


def test_an_unknown_step_is_named():
    with pytest.raises(ValueError, match="step: expected one of sign, l2norm, adam, rms, got 'x'"):
        Stepper("x")
    assert set(STEPS) == {"sign", "l2norm", "adam", "rms"}


@pytest.mark.parametrize(
    ("ce", "paper", "code"), [(0.3, 0.4998, 0.5003), (0.8, 0.8, 0.8), (2.0, 2.0, 2.0)]
)
def test_toward_table(ce, paper, code):
    ce = torch.tensor(ce, dtype=torch.float64)
    assert float(cut(ce, 0.5)) == pytest.approx(paper, abs=1e-12)
    assert float(cut(ce, 0.5, reference_compatible=True)) == pytest.approx(code, abs=1e-12)


@pytest.mark.parametrize(
    ("ce", "paper", "code"), [(1.0, -1.0, -1.0), (4.0, -4.0, -4.0), (8.0, -5.003, -5.008)]
)
def test_away_table(ce, paper, code):
    ce = torch.tensor(ce, dtype=torch.float64)
    assert float(cut(-ce, -5.0)) == pytest.approx(paper, abs=1e-12)
    assert float(cut(-ce, -5.0, reference_compatible=True)) == pytest.approx(code, abs=1e-12)


def test_a_cut_off_is_continuous_and_keeps_a_thousandth_of_the_slope():
    at = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64, requires_grad=True)
    values = cut(at, 0.5)
    assert float(values[1].detach()) == pytest.approx(0.5, abs=1e-12)
    (slope,) = torch.autograd.grad(values.sum(), at)
    assert slope.tolist() == pytest.approx([0.001, 0.001, 1.0])
    far = torch.tensor([1.0, 5.0, 8.0], dtype=torch.float64, requires_grad=True)
    values = cut(-far, -5.0)
    assert float(values[1].detach()) == pytest.approx(-5.0, abs=1e-12)
    (slope,) = torch.autograd.grad(values.sum(), far)
    assert slope.tolist() == pytest.approx([-1.0, -0.001, -0.001])
    assert torch.equal(cut(-far, -math.inf), -far)


@pytest.mark.parametrize(
    ("beta", "loss", "slope"), [(0.1, 19.36, -8.8), (0.25, 1.96, -2.8), (0.5, 0.16, -0.8)]
)
def test_ipo_table(beta, loss, slope):
    safe = torch.tensor([-0.8], dtype=torch.float64, requires_grad=True)
    rest = [torch.tensor([x], dtype=torch.float64) for x in (-1.1, -1.5, -1.2)]
    value = ipo(safe, *rest, beta)
    assert float(value.detach()) == pytest.approx(loss, abs=1e-10)
    (found,) = torch.autograd.grad(value.sum(), safe)
    assert float(found) == pytest.approx(slope, abs=1e-10)


def test_beta_is_above_0():
    with pytest.raises(ValueError, match="beta: expected a number above 0, got 0"):
        ipo(*(torch.zeros(1),) * 4, beta=0)


def test_tokens_below_the_floor_count_as_0():
    nll = torch.tensor([0.5, 5.0, 5.1, 9.0])
    assert floored(nll).tolist() == pytest.approx([0.5, 5.0, 0.0, 0.0])


def test_defaults_are_the_papers():
    ul, by_preference = TrainConfig(), TrainConfig.ipo(seed=3)
    assert (ul.steps, ul.batch, ul.max_length, ul.adversarial) == (780, 64, 256, 0.125)
    assert (ul.away_weight, ul.toward_weight, ul.utility_weight) == (0.5, 0.5, 1.0)
    assert (ul.away_cutoff, ul.toward_cutoff) == (-5.0, 0.5)
    assert (ul.attack.steps, ul.attack.rate, ul.attack.step, ul.attack.eps_rel) == (
        10, 1e-4, "sign", 0.05,
    )  # fmt: skip
    assert (by_preference.loss, by_preference.steps, by_preference.max_length) == ("ipo", 360, 128)
    assert (by_preference.adversarial, by_preference.beta, by_preference.seed) == (1.0, 0.25, 3)
    assert ul.factor(0) == 1.0
    assert ul.factor(390) == pytest.approx(0.5)


def test_the_released_codes_names_are_known():
    found = TrainConfig.from_reference(
        {
            "adversarial": {"iters": 7, "eps": 0.1, "opt_config": {"type": "sign", "lr": 1e-3}},
            "trainer_hparams": {"trainer_type": "ipo", "dpo_beta": 0.4},
            "dataset.probabilities": [0.25, 0.75],
            "sfttrainer.max_seq_length": 64,
        }
    )
    assert found.attack == AttackConfig(steps=7, eps_rel=0.1, rate=1e-3)
    assert (found.loss, found.beta, found.adversarial, found.max_length) == ("ipo", 0.4, 0.25, 64)
    assert found.steps == 360
    with pytest.raises(ValueError, match=r"config: expected keys among .*, got adversarial\.x"):
        TrainConfig.from_reference({"adversarial": {"x": 1}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "dpo"}, "loss: expected ul or ipo, got 'dpo'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"adversarial": 2.0}, "adversarial: expected a probability, got 2.0"),
        ({"beta": 0.0}, "beta: expected a number above 0, got 0.0"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": "walk"}, "step: expected one of sign, l2norm, adam, rms, got 'walk'"),
        ({"unit": "feet"}, "unit: expected one of absolute, ball, got 'feet'"),
        ({"init": "ones"}, "init: expected one of zero, ball, got 'ones'"),
        ({"keep": "all"}, "keep: expected one of last, best, got 'all'"),
        ({"steps": -1}, "steps: expected a number >= 0, got -1"),
        ({"eps_rel": math.inf, "unit": "ball"}, "eps_rel: expected a finite radius"),
    ],
)
def test_bad_attacks_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        AttackConfig(**values)
