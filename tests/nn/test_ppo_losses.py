"""Clipped losses, their sums over a batch in pieces, importance weights and metrics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_ext.nn.ppo import (
    AGGREGATIONS,
    Counts,
    aggregate,
    count,
    entropy_loss,
    explained_variance,
    importance_weights,
    policy_loss,
    policy_metrics,
    token_weights,
    value_loss,
)

F64 = {"dtype": torch.float64}


def test_policy_loss_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 8.0], **F64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, -1.0], **F64)
    logp = ratio.log().requires_grad_()
    found = policy_loss(logp, torch.zeros(6, **F64), advantages, dual_clip=3.0)
    expected = torch.tensor([-1.2, 1.5, -0.5, 0.8, -2.2, 3.0], **F64)
    torch.testing.assert_close(found.loss, expected)
    assert found.clipped.tolist() == [True, False, False, True, False, False]
    assert found.dual_clipped.tolist() == [False] * 5 + [True]
    torch.testing.assert_close(found.ratio, ratio)
    found.loss.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([0, 1.5, -0.5, 0, -2.2, 0], **F64))


def test_clips_of_both_sides():
    ratio = torch.tensor([1.25, 1.4, 0.75], **F64)
    advantages = torch.tensor([1.0, 1.0, -1.0], **F64)
    found = policy_loss(ratio.log(), torch.zeros(3, **F64), advantages, clip=0.1, clip_high=0.3)
    torch.testing.assert_close(found.loss, torch.tensor([-1.25, -1.3, 0.9], **F64))


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    logp = torch.randn(50, **F64).requires_grad_()
    advantages = torch.randn(50, **F64)
    found = policy_loss(logp, logp.detach().clone(), advantages)
    assert (found.ratio == 1).all()
    assert not found.clipped.any()
    found.loss.sum().backward()
    torch.testing.assert_close(logp.grad, -advantages)


def test_far_tokens_have_finite_gradients():
    logp = torch.tensor([200.0, -200.0], requires_grad=True)
    loss = policy_loss(logp, torch.zeros(2), torch.tensor([1.0, -1.0])).loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logp.grad.isfinite().all()


def test_value_loss_by_hand():
    values = torch.tensor([1.0, 1.0, 0.0], **F64).requires_grad_()
    found = value_loss(
        values, torch.tensor([0.5, 0.5, 0.0], **F64), torch.tensor([1.0, 0.0, 2.0], **F64)
    )
    torch.testing.assert_close(found.loss, torch.tensor([0.045, 0.5, 2.0], **F64))
    assert found.clipped.tolist() == [True, False, False]
    found.loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 1.0, -2.0], **F64))


def test_a_clipped_value_loss_is_never_below_the_plain_one():
    values, old, returns = torch.randn(3, 200, **F64)
    plain = value_loss(values, old, returns, clip=None)
    torch.testing.assert_close(plain.loss, (values - returns) ** 2 / 2)
    assert not plain.clipped.any()
    assert (value_loss(values, old, returns).loss >= plain.loss).all()


def test_entropy_bonus():
    assert entropy_loss(torch.tensor([2.0, 0.0]), 0.5).tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 1.0}, r"expected clip in \[0, 1\), got 1.0"),
        ({"clip_high": -0.1}, r"expected clip_high >= 0, got -0.1"),
        ({"dual_clip": 1.0}, r"expected dual_clip to be None or above 1, got 1.0"),
    ],
)
def test_bad_clips(options, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), **options)
    with pytest.raises(ValueError, match=r"expected clip to be None or positive, got 0"):
        value_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), clip=0)


def test_aggregations_by_hand():
    lengths = torch.tensor([1, 0, 3])
    loss = torch.tensor([8.0, 1.0, 2.0, 3.0])
    expected = {
        "token-mean": 14 / 4,
        "seq-mean-token-sum": (8 + 6) / 2,
        "seq-mean-token-mean": (8 + 2) / 2,
        "seq-mean-token-sum-norm": (8 + 6) / 2 / 10,
    }
    assert set(expected) == set(AGGREGATIONS)
    for mode, value in expected.items():
        horizon = 10 if mode.endswith("norm") else None
        assert aggregate(loss, lengths, mode, horizon=horizon).item() == pytest.approx(value)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    pieces=st.integers(1, 5),
    mode=st.sampled_from(AGGREGATIONS),
)
@settings(deadline=None)
def test_pieces_add_up_to_the_whole(lengths, pieces, mode):
    lengths = torch.tensor(lengths)
    loss = torch.randn(int(lengths.sum()))
    counts = count(lengths)
    options = {"mode": mode, "counts": counts, "horizon": 9}
    whole = aggregate(loss, lengths, mode, horizon=9)
    offsets = [0, *lengths.cumsum(0).tolist()]
    parts, at = [], 0
    for piece in lengths.tensor_split(pieces):
        part = loss[offsets[at] : offsets[at + len(piece)]]
        parts.append(aggregate(part, piece, **options))
        at += len(piece)
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=1e-5)


def test_no_token_keeps_the_graph():
    loss = torch.zeros(0, requires_grad=True)
    total = aggregate(loss, torch.tensor([0, 0]))
    total.backward()
    assert total.item() == 0
    assert count(torch.tensor([0, 2, 5])) == Counts(7, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_weights(torch.tensor([1]), "mean"), r"mode to be one of token-mean.*'mean'"),
        (
            lambda: token_weights(torch.tensor([1]), "seq-mean-token-sum-norm"),
            r"expected a horizon >= 1 for 'seq-mean-token-sum-norm', got None",
        ),
        (lambda: aggregate(torch.zeros(2), torch.tensor([1])), r"sum N = 2, got the sum 1"),
    ],
)
def test_bad_aggregations(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_importance_weights():
    weights = torch.tensor([0.5, 1.0, 4.0, 0.1, 1.5], **F64)
    sampler = -weights.log()
    old, lengths = torch.zeros(5, **F64), torch.tensor([3, 0, 2])

    def found(**options):
        return importance_weights(old, sampler, lengths, **options).tolist()

    assert found() == pytest.approx([0.5, 1, 2, 0.1, 1.5])
    assert found(floor=0.2, cap=3) == pytest.approx([0.5, 1, 3, 0.2, 1.5])
    assert found(mode="mask", floor=0.2) == pytest.approx([0.5, 1, 0, 0, 1.5])
    assert found(cap=None) == pytest.approx(weights.tolist())
    assert found(level="sequence", cap=1.5) == pytest.approx([1.5] * 3 + [0.15] * 2)
    assert found(level="sequence", mode="mask", cap=1.5) == pytest.approx([0] * 3 + [0.15] * 2)
    sampler[2] = float("nan")
    assert found()[2] == 1


def test_importance_weights_make_the_sampled_mean_the_policys():
    """E_q[w f] = E_pi[f] over a whole vocabulary, where no bound is hit."""
    logp, logq = torch.randn(2, 9, **F64).log_softmax(-1)
    f = torch.randn(9, **F64)
    w = importance_weights(logp, logq, cap=None)
    torch.testing.assert_close((logq.exp() * w * f).sum(), (logp.exp() * f).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "word"}, r"level to be 'token' or 'sequence', got 'word'"),
        ({"mode": "clip"}, r"mode to be 'truncate' or 'mask', got 'clip'"),
        ({"cap": 0.1, "floor": 0.5}, r"0 <= floor <= cap, got floor 0.5 and cap 0.1"),
        ({"level": "sequence"}, r"expected lengths for level 'sequence', got None"),
    ],
)
def test_bad_importance_weights(options, message):
    with pytest.raises(ValueError, match=message):
        importance_weights(torch.zeros(2), torch.zeros(2), **options)


def test_metrics_by_hand():
    delta = torch.tensor([0.5, -0.5, 0.0, 0.0], **F64)
    old = torch.randn(4, **F64)
    advantages = torch.tensor([1.0, 1.0, 1.0, 1.0], **F64)
    result = policy_loss(old + delta, old, advantages)
    values = value_loss(torch.ones(4), torch.zeros(4), torch.ones(4))
    found = policy_metrics(old + delta, old, result, values)
    assert found["approxkl"] == pytest.approx(0.0625)
    assert found["approxkl_k3"] == pytest.approx((math.exp(0.5) + math.exp(-0.5) - 2) / 4)
    assert found["clipfrac"] == 0.25
    assert found["dual_clipfrac"] == 0
    assert found["value_clipfrac"] == 1
    ratio = delta.exp()
    assert found["ratio"] == pytest.approx(ratio.mean().item())
    assert found["ratio_var"] == pytest.approx(ratio.var(unbiased=False).item())
    assert (found["ratio_min"], found["ratio_max"]) == pytest.approx(
        (math.exp(-0.5), math.exp(0.5))
    )
    assert "value_clipfrac" not in policy_metrics(old, old, result)


def test_metrics_of_nothing_are_nan():
    nothing = torch.zeros(0)
    found = policy_metrics(nothing, nothing, policy_loss(nothing, nothing, nothing))
    assert all(math.isnan(value) for value in found.values())


def test_explained_variance():
    returns = torch.randn(40, **F64)
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full_like(returns, 3), returns) == pytest.approx(0)
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, torch.ones_like(returns)))
    mask = torch.rand(40) < 0.5
    noisy = returns + 0.1 * torch.randn(40, **F64)
    assert explained_variance(noisy, returns, mask) == pytest.approx(
        explained_variance(noisy[mask], returns[mask])
    )
