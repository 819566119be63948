"""Advantages without a critic; RLOO and GRPO against the formulas of trl."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_ext.nn.ppo import grpo, reinforce_plus_plus, remax, rloo, whiten

NAN = float("nan")


def test_rloo_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    assert rloo(rewards, 3).tolist() == pytest.approx([-3, -1.5, 4.5, -1.5, -1.5, 3])


@given(st.lists(st.floats(-10, 10), min_size=8, max_size=8), st.floats(-5, 5))
@settings(deadline=None)
def test_rloo_is_the_centred_reward_of_any_origin(values, shift):
    rewards = torch.tensor(values, dtype=torch.float64)
    groups = rewards.view(2, 4)
    expected = 4 / 3 * (groups - groups.mean(1, keepdim=True))
    torch.testing.assert_close(rloo(rewards, 4), expected.flatten(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(rloo(rewards + shift, 4), rloo(rewards, 4), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("missing", [0, 3])
def test_as_trl(missing):
    """The arithmetic of trl 1.16's trainers, written out with its own nan-aware helpers."""
    utils = pytest.importorskip("trl.trainer.utils")
    k = 4
    rewards = torch.randn(5 * k)
    rewards[torch.randperm(5 * k)[:missing]] = NAN
    rewards[:k] = torch.tensor([NAN, NAN, NAN, 1.0])
    groups = rewards.view(-1, k)
    scorable = (~groups.isnan()).sum(1, keepdim=True)
    baseline = ((groups.nansum(1, keepdim=True) - groups) / (scorable - 1)).view(-1)
    torch.testing.assert_close(rloo(rewards, k), (rewards - baseline).nan_to_num(nan=0.0))

    centred = rewards - groups.nanmean(1).repeat_interleave(k)
    scales = {
        "group": utils.nanstd(groups, dim=1).nan_to_num(nan=0.0).repeat_interleave(k) + 1e-4,
        "batch": utils.nanstd(rewards) + 1e-4,
        "none": torch.tensor(1.0),
    }
    for scale, divisor in scales.items():
        expected = (centred / divisor).nan_to_num(nan=0.0)
        torch.testing.assert_close(grpo(rewards, k, scale=scale), expected, atol=1e-5, rtol=1e-5)


def test_grpo_of_a_tied_group_is_exactly_zero():
    rewards = torch.tensor([0.3, 0.3, 0.3, 0.1, 0.2, 0.7])
    for scale in ("group", "batch", "none"):
        advantages = grpo(rewards, 3, scale=scale)
        assert advantages[:3].tolist() == [0, 0, 0]
        assert advantages[3:].abs().min() > 0
    assert rloo(rewards, 3)[:3].tolist() == [0, 0, 0]


def test_remax():
    found = remax(torch.tensor([1.0, NAN, 3.0]), torch.tensor([0.5, 1.0, 3.0]))
    assert found.tolist() == [0.5, 0, 0]


def test_reinforce_plus_plus():
    rewards = torch.tensor([0.0, 0.0, 1.0, -0.5, 2.0])
    returns = torch.tensor([0.81, 0.9, 1.0, 1.3, 2.0])
    found = reinforce_plus_plus(rewards, torch.tensor([3, 2]), gamma=0.9)
    torch.testing.assert_close(found, whiten(returns))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rloo(torch.zeros(5), 2), r"multiple of group_size >= 2, got \[5\] and 2"),
        (lambda: grpo(torch.zeros(4), 1), r"multiple of group_size >= 2, got \[4\] and 1"),
        (lambda: grpo(torch.zeros(4), 2, scale="std"), r"scale to be one of group.*got 'std'"),
        (lambda: remax(torch.zeros(2), torch.zeros(3)), r"greedy_rewards to be \[2\], got \[3\]"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
