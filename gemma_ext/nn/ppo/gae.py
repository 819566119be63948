"""Generalised advantage estimation (arXiv 1506.02438, eq. 16) of finished responses.

    delta_t = R_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   G_t = A_t + V_t

with V = A = 0 after the last token. The recurrence is solved by doubling, in log2(T) passes over
the packed tokens instead of T steps; a coefficient of 0 ends each response.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.nn.ppo.packing import check_lengths, padded


def packed_gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of packed responses, without gradient.

    Args:
        rewards: [N] R_t, of each token.
        values: [N] V_t, of the state before the token.
        lengths: [B] tokens of each response.
        gamma, lam: discount and GAE's mixture, in [0, 1].

    Returns:
        A [N] and G [N], in the dtype of the inputs, at least float32. Those of a response depend,
        to the bit, on its own tokens only.
    """
    if rewards.ndim != 1 or rewards.shape != values.shape:
        raise ValueError(
            f"expected rewards and values to be [N], got {list(rewards.shape)} and "
            f"{list(values.shape)}"
        )
    check_lengths(lengths, len(rewards))
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"expected {name} in [0, 1], got {factor}")
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards, values = rewards.detach().to(dtype), values.detach().to(dtype)
    if not len(rewards):
        return rewards, values
    goes_on = torch.ones_like(rewards, dtype=torch.bool)
    goes_on[lengths.cumsum(0)[lengths > 0] - 1] = False
    following = torch.where(goes_on, values.roll(-1), 0)
    advantages = _reverse_scan(
        rewards + gamma * following - values, gamma * lam * goes_on.to(dtype), int(lengths.max())
    )
    return advantages, advantages + values


def padded_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """As `packed_gae` for padded rewards, values and bool mask [B, T]; 0 where mask is False.

    Tokens that the mask leaves out inside a response (a tool's answer) are passed over: the token
    after them follows the one before them.
    """
    if mask.ndim != 2 or not rewards.shape == values.shape == mask.shape:
        raise ValueError(
            f"expected rewards, values and mask to be [B, T], got {list(rewards.shape)}, "
            f"{list(values.shape)} and {list(mask.shape)}"
        )
    advantages, returns = packed_gae(rewards[mask], values[mask], mask.sum(1), gamma=gamma, lam=lam)
    return padded(advantages, mask), padded(returns, mask)


def _reverse_scan(x: Tensor, factor: Tensor, longest: int) -> Tensor:
    """y_t = x_t + factor_t y_{t+1}, for chains of at most `longest` factors that are not 0."""
    step = 1
    while step < longest:
        # where: 0 * inf of the next response would be nan here
        onward = torch.where(factor[:-step] != 0, factor[:-step] * x[step:], 0)
        x = torch.cat([x[:-step] + onward, x[-step:]])
        factor = torch.cat([factor[:-step] * factor[step:], factor[-step:]])
        step *= 2
    return x
