"""Importance weights for tokens drawn by another policy than the one that is trained.

    w = exp(logp_old - logp_sampler), of a token or summed over its sequence, then
    "truncate": clip(w, floor, cap);   "mask": 0 where w < floor or w > cap

The sampler may be stale or round differently. The loss of each token is multiplied by its weight,
which has no gradient (truncated importance sampling).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.nn.ppo.losses import LOG_RATIO_LIMIT
from gemma_ext.nn.ppo.packing import sequence_sum, spread


def importance_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    lengths: Tensor | None = None,
    *,
    level: str = "token",
    mode: str = "truncate",
    cap: float | None = 2.0,
    floor: float | None = None,
) -> Tensor:
    """Weights [N] of packed tokens, in [0, cap].

    Args:
        old_logprobs: [N] by the training forward, before the first update.
        sampler_logprobs: [N] as the sampler reported them; nan (unknown) has weight 1.
        lengths: [B]; needed for `level="sequence"`.
        level, mode: "token" or "sequence"; "truncate" or "mask". trl's `token_truncate` is these.
        cap, floor: bounds; None for none. trl has a cap of 3.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"expected level to be 'token' or 'sequence', got {level!r}")
    if mode not in ("truncate", "mask"):
        raise ValueError(f"expected mode to be 'truncate' or 'mask', got {mode!r}")
    low = 0.0 if floor is None else floor
    high = float("inf") if cap is None else cap
    if not 0 <= low <= high:
        raise ValueError(f"expected 0 <= floor <= cap, got floor {floor} and cap {cap}")
    log_ratio = torch.nan_to_num((old_logprobs - sampler_logprobs).detach(), nan=0.0)
    if level == "sequence":
        if lengths is None:
            raise ValueError("expected lengths for level 'sequence', got None")
        log_ratio = spread(sequence_sum(log_ratio, lengths), lengths)
    weight = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if mode == "truncate":
        return weight.clamp(low, high)
    return weight.masked_fill((weight < low) | (weight > high), 0)
