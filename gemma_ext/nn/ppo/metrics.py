"""What an update did, over all tokens of a batch and all ranks.

approxkl = mean(Delta^2) / 2,  approxkl_k3 = mean(exp(Delta) - 1 - Delta),  Delta = logp - logp_old
explained variance = 1 - Var(G - V) / Var(G)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gemma_ext.nn.ppo.kl import kl_estimate
from gemma_ext.nn.ppo.losses import PolicyLoss, ValueLoss
from gemma_ext.nn.ppo.whitening import moments


def policy_metrics(
    logprobs: Tensor,
    old_logprobs: Tensor,
    result: PolicyLoss,
    value_result: ValueLoss | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Means over tokens: approxkl, approxkl_k3, clipfrac, dual_clipfrac, value_clipfrac, ratio.

    Args:
        logprobs, old_logprobs: [N] that `result` was made of.
        value_result: of the same tokens; without it there is no value_clipfrac.

    Returns:
        Also ratio_var (biased, as trl's), ratio_min and ratio_max. nan where no rank has a token.
    """
    old = old_logprobs.detach()
    per_token = {
        "approxkl": kl_estimate(logprobs.detach(), old, "k2"),
        "approxkl_k3": kl_estimate(old, logprobs.detach(), "k3"),
        "clipfrac": result.clipped,
        "dual_clipfrac": result.dual_clipped,
    }
    if value_result is not None:
        per_token["value_clipfrac"] = value_result.clipped
    metrics = {name: float(moments(x, group=group).mean) for name, x in per_token.items()}
    _, mean, var = moments(result.ratio, unbiased=False, group=group)
    low, high = _extremes(result.ratio, group)
    return {
        **metrics,
        "ratio": float(mean),
        "ratio_var": float(var),
        "ratio_min": low,
        "ratio_max": high,
    }


def explained_variance(
    values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> float:
    """1 - var(G - V) / var(G): 1 for a perfect critic, 0 for a constant one; nan if G is constant.

    Args:
        values, returns: V and G, of one shape; mask: of the tokens that count, None for all.
    """
    left = moments(returns - values, mask, group=group).var
    total = moments(returns, mask, group=group).var
    return float(1 - left / total) if total > 0 else float("nan")


def _extremes(x: Tensor, group: dist.ProcessGroup | None) -> tuple[float, float]:
    nothing = x.new_full((1,), float("-inf"))
    both = torch.stack(
        [torch.cat([-x.flatten(), nothing]).max(), torch.cat([x.flatten(), nothing]).max()]
    )
    if group is not None:
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    low, high = -float(both[0]), float(both[1])
    return (low, high) if high >= low else (float("nan"), float("nan"))
