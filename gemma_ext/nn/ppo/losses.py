"""The clipped losses of PPO (arXiv 1707.06347), one value per token.

    rho = exp(logp - logp_old)
    L_pg = max(-A rho, -A clip(rho, 1 - eps_lo, 1 + eps_hi)),  and where A < 0 min(L_pg, -A c)
    L_v = 1/2 max((V - G)^2, (V_old + clip(V - V_old, -eps_v, eps_v) - G)^2)
    L_H = -c_H H

A token whose clipped branch wins has a gradient of exactly 0. `token_weights` makes one number of
them (`gemma_ext.nn.ppo.aggregation`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# |logp - logp_old| beyond which exp would make inf of rho and nan of its gradient; verl's bound
LOG_RATIO_LIMIT = 20.0


class PolicyLoss(NamedTuple):
    """Per token: the loss (differentiable), rho, and where a clip decided (bool)."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    dual_clipped: Tensor


class ValueLoss(NamedTuple):
    """Per token: the loss (differentiable) and where the clip decided (bool)."""

    loss: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """L_pg of each token.

    Args:
        logprobs, old_logprobs, advantages: any one shape; the gradient goes to `logprobs`.
        clip: eps_lo, in [0, 1).
        clip_high: eps_hi; `clip` for None.
        dual_clip: c > 1, which bounds the loss of tokens with A < 0 (arXiv 1912.09729, eq. 5);
            None for no bound, verl has 3.
    """
    high = clip if clip_high is None else clip_high
    if not 0 <= clip < 1:
        raise ValueError(f"expected clip in [0, 1), got {clip}")
    if high < 0:
        raise ValueError(f"expected clip_high >= 0, got {high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"expected dual_clip to be None or above 1, got {dual_clip}")
    old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
    ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip, 1 + high)
    loss, clipped = torch.maximum(plain, bounded), bounded > plain
    dual = torch.zeros_like(clipped)
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        dual = (advantages < 0) & (loss > ceiling)
        loss = torch.where(dual, ceiling, loss)
    return PolicyLoss(loss, ratio.detach(), clipped, dual)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2
) -> ValueLoss:
    """L_v of each token; half the squared error for `clip=None`."""
    old_values, returns = old_values.detach(), returns.detach()
    plain = (values - returns).square()
    if clip is None:
        return ValueLoss(plain / 2, torch.zeros_like(plain, dtype=torch.bool))
    if not clip > 0:
        raise ValueError(f"expected clip to be None or positive, got {clip}")
    # clamped in place: V_old + (V - V_old) would differ from V in the last bit, and seem clipped
    bounded = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return ValueLoss(torch.maximum(plain, bounded) / 2, bounded > plain)


def entropy_loss(entropy: Tensor, coef: float) -> Tensor:
    """L_H of each token: a bonus for entropy [...], in nats, as a loss."""
    return -coef * entropy
