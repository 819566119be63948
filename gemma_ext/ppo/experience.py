"""From responses and their scores to what an update needs of every token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gemma_ext.nn.ppo import (
    Reference,
    Sequences,
    exact_kl,
    grpo,
    importance_weights,
    kl_estimate,
    packed_gae,
    read,
    reinforce_plus_plus,
    remax,
    rloo,
    sequence_sum,
    spread,
    whiten,
)
from gemma_ext.nn.ppo.critic import Critic
from gemma_ext.ppo.config import PPOConfig
from gemma_ext.ppo.ranks import everyone


class TokenScores(NamedTuple):
    """Of every response token before the update, packed [N], float32.

    Attributes:
        logprobs: by the policy's training forward at the run's temperature.
        ref_logprobs: by the reference; None where the divergence is exact.
        kl: to the reference, by the run's estimator.
        entropy: of the policy. values: of the state before the token; None without a critic.
    """

    logprobs: Tensor
    ref_logprobs: Tensor | None
    kl: Tensor
    entropy: Tensor
    values: Tensor | None


@dataclass(frozen=True)
class Experience:
    """A batch of responses with what an update needs, per token [B, T], 0 behind their ends."""

    sequences: Sequences
    logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Experience:
        changed = {
            f.name: None if (value := getattr(self, f.name)) is None else value[rows]
            for f in dataclasses.fields(self)
        }
        return Experience(**changed)

    def packed(self, name: str) -> Tensor:
        """[N] of a field."""
        return self.sequences.pack(getattr(self, name))


@torch.no_grad()
def score_tokens(
    policy: nn.Module,
    critic: Critic | None,
    reference: Reference,
    sequences: Sequences,
    config: PPOConfig,
) -> TokenScores:
    """One pass of policy, reference and critic, some rows at a time."""
    parts = []
    for chunk in chunks(sequences, config.local_rollout_forward_batch_size):
        with config.autocast(chunk.ids.device):
            found = read(policy, chunk)
            logprobs, entropy = found.head.logprobs(chunk.targets, config.temperature)
            if config.kl_estimator == "full":
                ref, kl = None, exact_kl(found.head, reference.heads(chunk), config.temperature)
            else:
                ref = reference.logprobs(chunk, config.temperature)
                kl = kl_estimate(logprobs, ref, config.kl_estimator)
            values = None if critic is None else critic(chunk, found)
        parts.append((logprobs, ref, kl, entropy, values))
    columns = zip(*parts, strict=True)
    return TokenScores(*(None if c[0] is None else torch.cat(c) for c in columns))


def chunks(sequences: Sequences, size: int) -> Iterator[Sequences]:
    """Rows in order, `size` at a time, without columns that are padding in all of them."""
    for start in range(0, len(sequences), size):
        yield sequences[start : start + size].trimmed()


def build(
    sequences: Sequences,
    scores: Tensor,
    found: TokenScores,
    coef: float,
    config: PPOConfig,
    *,
    sampler_logprobs: Tensor | None = None,
    greedy_scores: Tensor | None = None,
) -> Experience:
    """Advantages of the run's kind, over the batch of all ranks.

    Args:
        scores: [B] of the responses; rows without tokens are those without a score.
        coef: beta of the divergence that is taken off the reward.
        sampler_logprobs: [N], for `importance_cap`.
        greedy_scores: [B] of the greedy responses to the same prompts, for "remax".
    """
    lengths, group = sequences.lengths, everyone()
    penalty = coef * found.kl if config.kl_in == "reward" else torch.zeros_like(found.kl)
    returns = None
    if config.advantage in ("gae", "reinforce++"):
        rewards = -penalty
        scored = lengths > 0
        last = lengths.cumsum(0)[scored] - 1
        rewards[last] += scores[scored]
        if config.whiten_rewards:
            rewards = whiten(
                rewards, shift_mean=False, unbiased=config.whiten_unbiased, group=group
            )
        if config.advantage == "gae":
            advantages, returns = packed_gae(
                rewards, found.values, lengths, gamma=config.gamma, lam=config.lam
            )
            if config.whiten_advantages:
                advantages = whiten(advantages, unbiased=config.whiten_unbiased, group=group)
        else:
            advantages = reinforce_plus_plus(
                rewards,
                lengths,
                gamma=config.gamma,
                unbiased=config.whiten_unbiased,
                group=group,
            )
    else:
        total = scores - sequence_sum(penalty, lengths)
        if config.advantage == "rloo":
            each = rloo(total, config.num_generations)
        elif config.advantage == "grpo":
            each = grpo(total, config.num_generations, scale=config.scale_rewards, group=group)
        else:
            each = remax(total, greedy_scores)
        advantages = spread(each, lengths)
    weights = torch.ones_like(advantages)
    if config.importance_cap is not None and sampler_logprobs is not None:
        weights = importance_weights(
            found.logprobs, sampler_logprobs, lengths, cap=config.importance_cap
        )

    def laid_out(values: Tensor | None) -> Tensor | None:
        return None if values is None else sequences.unpack(values)

    return Experience(
        sequences,
        *map(laid_out, (found.logprobs, advantages, weights, found.ref_logprobs, found.values)),
        laid_out(returns),
    )
