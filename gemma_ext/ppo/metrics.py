"""One line of metrics for a batch, under the names that trl's PPO had where it had one.

| name                           | over all ranks                                                  |
|--------------------------------|-----------------------------------------------------------------|
| objective/kl, kl_per_token     | nats of a response and of a token, by the run's estimator       |
| objective/kl_k3                | the same by k3, never negative; not where divergences are exact |
| objective/entropy              | nats of a response; policy/entropy_avg of a token, in updates   |
| objective/scores               | rewards, penalties for missing ends taken off                   |
| objective/rlhf_reward          | scores with non_score_reward = -beta KL of a response           |
| policy/*_avg, loss/*_avg       | means over all optimiser steps of the batch                     |
| val/ratio, val/ratio_var       | of exp(logp - logp_old)                                         |
| val/explained_variance         | of the returns by the values before the update                  |
| val/num_eos_tokens, response/* | ends, lengths in tokens, share of responses with an end         |
| sampler/*                      | log-probabilities of the sampler against those of training      |
| rewards/NAME, rewards/NAME/std | of each reward function                                         |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gemma_ext.nn.ppo import Sequences, explained_variance, kl_estimate, moments, sequence_sum
from gemma_ext.ppo.experience import Experience, TokenScores
from gemma_ext.ppo.ranks import everyone, mean_of
from gemma_ext.ppo.responses import Responses

_OF_UPDATE = {
    "approxkl": "policy/approxkl_avg",
    "approxkl_k3": "policy/approxkl_k3_avg",
    "clipfrac": "policy/clipfrac_avg",
    "dual_clipfrac": "policy/dual_clipfrac_avg",
    "entropy": "policy/entropy_avg",
    "loss/policy": "loss/policy_avg",
    "loss/value": "loss/value_avg",
    "value_clipfrac": "val/clipfrac_avg",
    "ratio": "val/ratio",
    "ratio_var": "val/ratio_var",
    "policy/grad_norm": "policy/grad_norm_avg",
    "value/grad_norm": "val/grad_norm_avg",
}


def of_batch(
    sequences: Sequences,
    scores: Tensor,
    each: Mapping[str, Tensor],
    responses: Responses,
    found: TokenScores,
    batch: Experience,
    updates: Sequence[Mapping[str, float]],
    coef: float,
    sampled: Tensor | None,
    ends: Sequence[int],
) -> dict[str, float]:
    """The line of a batch.

    Args:
        sequences: whose rows without a score have no tokens.
        scores: [B]; each: [B] of each reward function.
        found: before the update; updates: of its optimiser steps.
        sampled: [N] log-probabilities of the sampler.
    """
    lengths = sequences.lengths
    known = lengths > 0
    kl = sequence_sum(found.kl, lengths)[known]
    values = {
        **responses.metrics,  # first: a name of ours stays ours
        "objective/kl": kl,
        "objective/kl_per_token": found.kl,
        "objective/entropy": sequence_sum(found.entropy, lengths)[known],
        "objective/scores": scores,
        "objective/non_score_reward": -coef * kl,
        "objective/rlhf_reward": scores[known] - coef * kl,
        "response/length": lengths[known].float(),
        "response/eos_rate": ended(sequences, ends)[known].float(),
        **{f"rewards/{name}": rewards for name, rewards in each.items()},
    }
    if found.ref_logprobs is not None:
        k3 = kl_estimate(found.logprobs, found.ref_logprobs, "k3")
        values["objective/kl_k3"] = sequence_sum(k3, lengths)[known]
    if sampled is not None:
        values["sampler/k3"] = kl_estimate(sampled, found.logprobs, "k3")
        values["sampler/difference"] = (sampled - found.logprobs).abs()
    line = mean_of(values)
    line["val/num_eos_tokens"] = sum_of_ends(sequences, ends)
    line |= {
        f"rewards/{name}/std": float(
            moments(rewards, rewards.isfinite(), group=everyone()).var.sqrt()
        )
        for name, rewards in each.items()
    }
    if batch.returns is not None:
        line["val/explained_variance"] = explained_variance(
            batch.packed("values"), batch.packed("returns"), group=everyone()
        )
    for name, shown in _OF_UPDATE.items():
        some = [update[name] for update in updates if name in update]
        if some:
            line[shown] = sum(some) / len(some)
    line["kl_coef"] = coef
    return line


def ended(sequences: Sequences, ends: Sequence[int]) -> Tensor:
    """[B] bool: responses whose last token is an end."""
    last = sequences.responses.gather(1, (sequences.lengths - 1).clamp(min=0).unsqueeze(1))[:, 0]
    found = torch.isin(last, torch.tensor(list(ends), device=last.device, dtype=last.dtype))
    return found & (sequences.lengths > 0)


def sum_of_ends(sequences: Sequences, ends: Sequence[int]) -> float:
    """Responses of all ranks that have an end."""
    found = moments(ended(sequences, ends).float(), group=everyone())
    return float(found.count * found.mean)


def note(line: Mapping[str, float]) -> str:
    """What a progress bar says."""
    shown = (
        ("score", "objective/scores", ".3f"),
        ("KL", "objective/kl", ".2f"),
        ("length", "response/length", ".1f"),
        ("clipped", "policy/clipfrac_avg", ".2f"),
    )
    return ", ".join(f"{name} {line[key]:{how}}" for name, key, how in shown if key in line)
