"""PPO on responses of one token converges to the distribution that theory names.

With KL in the reward the best policy of each prompt is ref exp(r / beta) / Z: a bandit of V arms.
"""

from __future__ import annotations

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

PROMPTS, V, BATCH, EPOCHS = 3, 7, 512, 2
BETA = 0.5


def optimum(ref: Tensor, reward: Tensor) -> Tensor:
    return (ref + reward / BETA).softmax(-1)


def trained(ref: Tensor, reward: Tensor, *, steps: int, whitened: bool, kind: str) -> Tensor:
    """Log-probabilities [PROMPTS, V] of a table that PPO has trained from `ref`."""
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
            penalty = kl_estimate(old, ref[prompts, tokens], kind)
            rewards = reward[prompts, tokens] - BETA * penalty
            advantages, returns = packed_gae(rewards, old_values, lengths)
            if whitened:
                advantages = whiten(advantages)
        for _ in range(EPOCHS):
            new = logits.log_softmax(-1)[prompts, tokens]
            loss = policy_loss(new, old, advantages).loss
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
    found = trained(ref, reward, steps=600, whitened=whitened, kind="k1")
    assert tv(found.exp(), best) < 0.02
    gap = (best * reward).sum(-1) - BETA * full_kl(best.log(), ref)
    reached = (found.exp() * reward).sum(-1) - BETA * full_kl(found, ref)
    torch.testing.assert_close(reached, gap, atol=1e-3, rtol=0)
    torch.testing.assert_close(gap, BETA * (ref + reward / BETA).logsumexp(-1))


def test_k3_in_the_reward_has_another_optimum():
    """Its penalty falls where the policy is below the reference: known, and visible here."""
    torch.manual_seed(1)
    ref, reward = torch.randn(PROMPTS, V).log_softmax(-1), torch.rand(PROMPTS, V)
    found = trained(ref, reward, steps=600, whitened=False, kind="k3")
    assert tv(found.exp(), optimum(ref, reward)) > 0.02
