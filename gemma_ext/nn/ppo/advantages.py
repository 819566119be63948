"""Advantages without a critic, of K responses r_i to each prompt.

    RLOO (arXiv 2402.14740)       r_i - mean_{j != i} r_j
    GRPO (arXiv 2402.03300)       (r_i - mean r) / (std r + eps)         std of the group or batch
    Dr. GRPO (arXiv 2503.20783)   r_i - mean r                           scale "none"
    ReMax (arXiv 2310.10505)      r_i - r(greedy response)
    REINFORCE++ (arXiv 2501.03262)  whiten_batch(sum_{s >= t} gamma^{s-t} R_s)      per token

Responses to one prompt are neighbours. A reward of nan (no reward function had an opinion) takes no
part in the means, and its response has advantage 0.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gemma_ext.nn.ppo.gae import packed_gae
from gemma_ext.nn.ppo.whitening import moments, whiten

SCALES = ("group", "batch", "none")


def rloo(rewards: Tensor, group_size: int) -> Tensor:
    """Advantages [B] of rewards [B], `group_size` >= 2 of each prompt; 0 for one alone."""
    groups = _groups(rewards, group_size)
    known = ~groups.isnan()
    others = known.sum(1, keepdim=True) - 1
    baseline = (groups.nansum(1, keepdim=True) - groups) / others
    return torch.where(known & (others > 0), groups - baseline, 0).flatten()


def grpo(
    rewards: Tensor,
    group_size: int,
    *,
    scale: str = "group",
    eps: float = 1e-4,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Advantages [B] of rewards [B], `group_size` >= 2 of each prompt; "none" is Dr. GRPO.

    Args:
        scale: divide by the (Bessel-corrected) deviation of the "group", of the whole "batch" over
            the ranks of `group`, or by nothing.
        eps: added to the deviation.
    """
    if scale not in SCALES:
        raise ValueError(f"expected scale to be one of {', '.join(SCALES)}, got {scale!r}")
    groups = _groups(rewards, group_size)
    known = ~groups.isnan()
    n = known.sum(1, keepdim=True)
    centred = torch.where(known, groups - groups.nansum(1, keepdim=True) / n, 0)
    if scale == "group":
        std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)
    elif scale == "batch":
        std = moments(rewards, ~rewards.isnan(), group=group).var.sqrt().to(centred.dtype)
        centred = centred / (std + eps)
    return centred.flatten()


def remax(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """Advantages [B] of rewards [B] over those of the greedy responses to the same prompts [B]."""
    if rewards.shape != greedy_rewards.shape:
        raise ValueError(
            f"expected greedy_rewards to be {list(rewards.shape)}, got {list(greedy_rewards.shape)}"
        )
    return torch.nan_to_num(rewards - greedy_rewards, nan=0.0)


def reinforce_plus_plus(
    rewards: Tensor,
    lengths: Tensor,
    *,
    gamma: float = 1.0,
    unbiased: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Advantages [N] of packed token rewards [N], KL inside, whitened over the ranks of `group`.

    Args:
        unbiased: as of `whiten`.
    """
    _, returns = packed_gae(rewards, torch.zeros_like(rewards), lengths, gamma=gamma, lam=1.0)
    return whiten(returns, unbiased=unbiased, group=group)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards above the least of their group, [B / group_size, group_size]."""
    if rewards.ndim != 1 or group_size < 2 or len(rewards) % group_size:
        raise ValueError(
            f"expected rewards [B] with B a multiple of group_size >= 2, got "
            f"{list(rewards.shape)} and {group_size}"
        )
    groups = rewards.detach().view(-1, group_size)
    # counted from the least of the group, equal rewards have advantage 0 to the bit
    return groups - groups.nan_to_num(nan=float("inf")).amin(1, keepdim=True)
