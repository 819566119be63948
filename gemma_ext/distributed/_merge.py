"""Differentiable merging of per-shard row statistics of one softmax.

Rank r holds the columns of its vocabulary shard and knows, per row n, `lse_r = logsumexp_{v in r}
s_nv`, `m_r = sum_{v in r} softmax_r(s)_v s_nv`, its share of the target logit (0 where another rank
owns the label) and of `sum_v w_v s_nv`. With `x_r = exp(lse_r - L)` the whole row has

    L = logsumexp_r lse_r      m = sum_r x_r m_r      t = sum_r t_r      w = sum_r w_r

and the backward needs no communication:

    d lse_r = x_r (dL + dm (m_r - m))      d m_r = x_r dm      d t_r = dt      d w_r = dw
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gemma_ext.ops._derivatives import apply, once


class RowStatistics(NamedTuple):
    """Per-row vectors [N], of one shard or of the whole vocabulary; None where not asked for."""

    lse: Tensor
    target_logit: Tensor
    mean_logit: Tensor | None = None
    weighted_logit_sum: Tensor | None = None


def gather_ranks(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Stack `local` of every rank in rank order: [...] -> [R, ...]."""
    gathered = local.new_empty(dist.get_world_size(group), *local.shape)
    dist.all_gather(list(gathered.unbind(0)), local.contiguous(), group=group)
    return gathered


def merge_shards(local: RowStatistics, group: dist.ProcessGroup) -> RowStatistics:
    """Combine the shards' row statistics; every rank gets the same bits.

    One all-gather of at most four vectors, summed in rank order in float64, in place of a MAX and a
    SUM all-reduce: one round trip less, and the result does not depend on the backend's reduction
    algorithm. Costs 4 to 16 bytes per row and rank.
    """
    return RowStatistics(*apply(MergeShards, group, *local))


@torch.no_grad()
def merge_moments(
    local: tuple[Tensor, Tensor, Tensor], columns: int, vocab_size: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """log sum p^2 and the average logit over the whole vocabulary, [N].

    One all-gather of three vectors, added in rank order in float64.

    Args:
        local: (lse, log sum p^2 of its own softmax, average logit) of this rank's columns.
    """
    lse, squares, average = local
    gathered = gather_ranks(torch.stack((lse, squares, average * columns)), group).double()
    lse_all, squares, sums = gathered.unbind(1)  # [R, N] each
    share = lse_all - torch.logsumexp(lse_all, 0)
    # a shard without columns, or masked by a bias of -inf, has no share and squares of nothing
    squares = torch.where(torch.isneginf(share), share, squares + 2 * share)
    whole = torch.logsumexp(squares, 0), sums.sum(0) / vocab_size
    return tuple(x.to(lse.dtype) for x in whole)


def reduce_gradient(e: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Identity whose backward sums the gradient over the group in at least float32."""
    return apply(ReduceGradient, e, group)


def empty_shard_rows(e: Tensor, c: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[N] vector -inf of a shard without columns, tied to `e`, `c`, `bias` with zero gradients.

    The tie keeps the rank in the backward's collectives, which would otherwise wait for it for
    ever.
    """
    return apply(EmptyShardRows, e, c, bias, dtype)


class MergeShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, lse, target_logit, mean_logit, weighted_logit_sum):
        local = (lse, target_logit, mean_logit, weighted_logit_sum)
        asked = [vector for vector in local if vector is not None]
        columns = list(gather_ranks(torch.stack(asked), group).double().unbind(1))  # [R, N] each

        lse_all = columns.pop(0)
        lse_global = torch.logsumexp(lse_all, 0)
        shares = torch.exp(lse_all - lse_global)  # [R, N]
        share = shares[dist.get_rank(group)].to(lse.dtype)
        target_global = columns.pop(0).sum(0)
        mean_global = None
        if mean_logit is not None:
            # a shard masked by a bias of -inf has no mean logit, and no share of it
            mean_all = torch.where(shares > 0, columns.pop(0), 0.0)
            mean_global = (shares * mean_all).sum(0).to(lse.dtype)
            mean_logit = torch.where(share > 0, mean_logit, 0.0)
        weighted_global = None
        if weighted_logit_sum is not None:
            weighted_global = columns.pop(0).sum(0).to(lse.dtype)

        ctx.save_for_backward(share, mean_logit, mean_global)
        ctx.set_materialize_grads(False)
        return (
            lse_global.to(lse.dtype),
            target_global.to(lse.dtype),
            mean_global,
            weighted_global,
        )

    @staticmethod
    @once
    def backward(ctx, d_lse, d_target, d_mean, d_weighted):
        share, mean_logit, mean_global = ctx.saved_tensors
        d_lse_local = None if d_lse is None else share * d_lse
        d_mean_local = None
        if d_mean is not None:
            d_mean_local = share * d_mean
            through_mean = d_mean_local * (mean_logit - mean_global)
            d_lse_local = through_mean if d_lse_local is None else d_lse_local + through_mean
        return None, d_lse_local, d_target, d_mean_local, d_weighted


class ReduceGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, e, group):
        ctx.group = group
        return e.view_as(e)

    @staticmethod
    @once
    def backward(ctx, grad):
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


class EmptyShardRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, e, c, bias, dtype):
        ctx.save_for_backward(e, c, bias)
        return e.new_full(e.shape[:1], -torch.inf, dtype=dtype)

    @staticmethod
    @once
    def backward(ctx, grad):
        zeros = [
            torch.zeros_like(tensor) if wanted else None
            for tensor, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        ]
        return (*zeros, None)
