"""Losses of reward models: Bradley-Terry, with a penalty on squares (Reg), and ODIN's.

    BT    -log sigma(r_c - r_r)
    Reg   BT + w (r_c^2 + r_r^2), w = 0.005
    ODIN  BT of r_Q + r_L, + l_L (|rho(r_Q, T)| - rho(r_L, T)) + l_O |W_Q . W_L| / (|W_Q| |W_L|)

ODIN (arXiv 2402.07319): rho is Pearson's over the global batch. The reference implementation
gathers it outside of autograd, so that with several ranks its length term has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

REG = 0.005
_NORM_FLOOR = 1e-6


def bradley_terry(chosen: Tensor, rejected: Tensor, reg: float = 0.0) -> Tensor:
    """Mean of -log sigma(chosen - rejected) + reg (chosen^2 + rejected^2) over the pairs [B]."""
    squares = chosen**2 + rejected**2
    return (reg * squares - F.logsigmoid(chosen - rejected)).mean()


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of two vectors; 0, with no gradient, where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    norms = (x.square().sum() * y.square().sum()).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    return (x * y).sum() / norms


def odin_penalties(
    quality: Tensor, length: Tensor, tokens: Tensor, head: Tensor, *, group: Any = None
) -> tuple[Tensor, Tensor]:
    """(|rho(r_Q, T)| - rho(r_L, T), overlap of the heads); the first over all ranks of the group.

    Args:
        quality, length: [B] of the two heads, chosen and rejected responses alike.
        tokens: [B] lengths of the responses.
        head: [2, D] weights, quality first.
    """
    table = gather_rows(torch.stack([quality, length, tokens.to(quality.dtype)], 1), group)
    quality, length, tokens = table.unbind(1)
    apart = pearson(quality, tokens).abs() - pearson(length, tokens)
    q, w = head.to(quality.dtype)
    overlap = (q @ w).abs() / (q.norm() * w.norm() + _NORM_FLOOR)
    return apart, overlap


def gather_rows(rows: Tensor, group: Any = None) -> Tensor:
    """[B, C] of all ranks, one after another; differentiable, B may differ.

    The gradient of a rank's rows is the sum of what all ranks ask of them, so that a loss which
    every rank computes from all rows has its own gradient once DDP has taken the mean.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return rows
    return _Gather.apply(rows, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        import torch.distributed as dist

        world, rank = dist.get_world_size(group), dist.get_rank(group)
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.zeros_like(count) for _ in range(world)]
        dist.all_gather(counts, count, group=group)
        sizes = [int(each) for each in counts]
        wide = rows.new_zeros(max(sizes), rows.shape[1])
        wide[: len(rows)] = rows
        parts = [torch.empty_like(wide) for _ in range(world)]
        dist.all_gather(parts, wide, group=group)
        ctx.group, ctx.start, ctx.size = group, sum(sizes[:rank]), len(rows)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        import torch.distributed as dist

        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.start : ctx.start + ctx.size], None
