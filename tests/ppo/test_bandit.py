"""PPO on responses of one token converges to the distribution that theory names.

With KL in the reward the best policy of each prompt is ref exp(r / beta) / Z: a bandit of V arms.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor

from gemma_ext.nn.ppo import (
    aggregate,
    full_kl,
    kl_estimate,
    packed_gae,
    policy_loss,
    value_loss,
    whiten,
)
from gemma_ext.ppo import PPOConfig

PROMPTS, V, BATCH, EPOCHS = 3, 7, 512, 2
BETA = 0.5


def optimum(ref: Tensor, reward: Tensor) -> Tensor:
    return (ref + reward / BETA).softmax(-1)


def divergence(table: Tensor, ref: Tensor, prompts: Tensor, tokens: Tensor, kind: str) -> Tensor:
    if kind == "full":
        return full_kl(table, ref)[prompts]
    return kl_estimate(table[prompts, tokens], ref[prompts, tokens], kind)


def trained(
    ref: Tensor,
    reward: Tensor,
    *,
    steps: int = 600,
    whitened: bool = False,
    kind: str = "k1",
    place: str = "reward",
) -> Tensor:
    """Log-probabilities [PROMPTS, V] of a table that PPO has trained from `ref`.

    Args:
        kind, place: of the KL, a penalty on the "reward" or a term of the "loss".
    """
    logits, critic = ref.clone().requires_grad_(), torch.zeros(PROMPTS, requires_grad=True)
    groups = [{"params": [logits], "lr": 0.05}, {"params": [critic], "lr": 0.1}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    lengths = torch.ones(BATCH, dtype=torch.int64)
    for _ in range(steps):
        prompts = torch.randint(PROMPTS, (BATCH,))
        with torch.no_grad():
            old_table = logits.log_softmax(-1)
            tokens = torch.multinomial(old_table[prompts].exp(), 1)[:, 0]
            old, old_values = old_table[prompts, tokens], critic[prompts]
            rewards = reward[prompts, tokens]
            if place == "reward":
                rewards = rewards - BETA * divergence(old_table, ref, prompts, tokens, kind)
            advantages, returns = packed_gae(rewards, old_values, lengths)
            if whitened:
                advantages = whiten(advantages)
        for _ in range(EPOCHS):
            table = logits.log_softmax(-1)
            loss = policy_loss(table[prompts, tokens], old, advantages).loss
            if place == "loss":
                loss = loss + BETA * divergence(table, ref, prompts, tokens, kind)
            loss = loss + value_loss(critic[prompts], old_values, returns).loss
            optimizer.zero_grad()
            aggregate(loss, lengths).backward()
            optimizer.step()
        schedule.step()
    return logits.detach().log_softmax(-1)


def tv(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum(-1).max() / 2)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("reference", ["single", "soup"])
def test_converges_to_the_optimum(reference, whitened):
    torch.manual_seed(0)
    first, second = torch.randn(2, PROMPTS, V)
    # a soup averages weights; those of a table are its logits
    ref = (first if reference == "single" else 0.5 * (first + second)).log_softmax(-1)
    reward = torch.rand(PROMPTS, V)
    best = optimum(ref, reward)
    assert tv(ref.exp(), best) > 0.1
    found = trained(ref, reward, whitened=whitened)
    # at the optimum every arm has the same reward less penalty, and samples stop to matter
    assert tv(found.exp(), best) < 0.005
    gap = (best * reward).sum(-1) - BETA * full_kl(best.log(), ref)
    reached = (found.exp() * reward).sum(-1) - BETA * full_kl(found, ref)
    torch.testing.assert_close(reached, gap, atol=1e-3, rtol=0)
    torch.testing.assert_close(gap, BETA * (ref + reward / BETA).logsumexp(-1))


@pytest.mark.parametrize("kind", ["full", "k2", "k1+", "k3+"])
def test_in_the_loss_the_right_gradient_counts(kind):
    torch.manual_seed(0)
    ref, reward = torch.randn(PROMPTS, V).log_softmax(-1), torch.rand(PROMPTS, V)
    found = trained(ref, reward, kind=kind, place="loss")
    assert tv(found.exp(), optimum(ref, reward)) < 0.02


@pytest.mark.parametrize(
    ("kind", "place"),
    [("k2", "reward"), ("k3", "reward"), ("full", "reward"), ("k1", "loss"), ("k3", "loss")],
)
def test_elsewhere_they_end_at_another_policy(kind, place):
    """What the docstring of `gemma_ext.nn.ppo.kl` warns of."""
    torch.manual_seed(0)
    ref, reward = torch.randn(PROMPTS, V).log_softmax(-1), torch.rand(PROMPTS, V)
    found = trained(ref, reward, kind=kind, place=place)
    assert tv(found.exp(), optimum(ref, reward)) > 0.04


@pytest.mark.parametrize("place", ["reward", "loss"])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "full", "k1+", "k3+", "abs"])
def test_settings_warn_of_what_ends_elsewhere(kind, place):
    settings = {"kl_estimator": kind, "kl_in": place}
    good = {"reward": ("k1", "k1+"), "loss": ("full", "k2", "k1+", "k3+")}[place]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if kind in good:
            PPOConfig(**settings)
        PPOConfig(**settings, kl_coef=0.0)
    if kind not in good:
        with pytest.warns(UserWarning, match=f"{re.escape(kind)} in the {place} does not lead to"):
            PPOConfig(**settings)
