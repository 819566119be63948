"""Per-row quantities of a head whose vocabulary is spread over the ranks of a group."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gemma_ext.distributed._merge import (
    RowStatistics,
    empty_shard_rows,
    gather_ranks,
    merge_shards,
    reduce_gradient,
)
from gemma_ext.distributed._shards import VocabShard
from gemma_ext.ops.cce import Head, Method, Rows, rows_of_head
from gemma_ext.ops.cce.inputs import to_autocast

_IGNORED = -100
_ELSEWHERE = -1
_ARGMAX_ROWS = 1024  # rows of c gathered at a time, a few MiB at D = 2304


def vocab_parallel_rows(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    shard: VocabShard,
    head: Head,
    method: Method,
    *,
    class_weight: Tensor | None,
    want_entropy: bool,
    want_argmax: bool,
    reduce_e_grad: bool,
) -> Rows:
    """`gemma_ext.ops.cce.rows_of_head` over the union of the shards; the same on every rank.

    Args:
        e: [N, D], the same on every rank. c: [V_local, D]; bias, class_weight: [V_local] or None.
        targets: [N] labels in the whole vocabulary; one outside it has nll NaN.
    """
    rows = shard.stop - shard.start
    valid = targets != head.ignore_index
    relative = targets.long() - shard.start
    owned = valid & (relative >= 0) & (relative < rows)
    e = reduce_gradient(e, shard.group) if reduce_e_grad else e
    if rows:
        local_e, local_c, local_bias = to_autocast(e, c, bias)
        local = rows_of_head(
            local_e,
            local_c,
            torch.where(owned, relative, torch.where(valid, _ELSEWHERE, _IGNORED)),
            local_bias,
            dataclasses.replace(head, ignore_index=_IGNORED),
            method,
            class_weight=class_weight,
            want_entropy=want_entropy,
            want_argmax=want_argmax,
            allow_missing=True,
        )
    else:
        local = _empty_rows(e, c, bias, class_weight, want_entropy, want_argmax)

    zero = torch.zeros_like(local.lse)
    nowhere = valid & ((targets < 0) | (targets >= shard.vocab_size))
    merged = merge_shards(
        RowStatistics(
            local.lse,
            # a row owned elsewhere stays out of the subtraction, whose backward would cost its
            # gradient x_r g the rounding of g + (x_r g - g)
            torch.where(owned, local.lse - local.nll, zero),
            local.mean_logit,
            local.weighted_logit_sum,
        ),
        shard.group,
    )
    argmax = None
    if want_argmax:
        logit = _chosen_logit(e, c, bias, local.argmax, head)
        argmax = torch.where(valid, _merge_argmax(logit, local.argmax, shard), -1)
    return Rows(
        torch.where(valid, merged.lse - merged.target_logit, zero).masked_fill(nowhere, torch.nan),
        torch.where(valid, merged.lse, zero),
        None if merged.mean_logit is None else torch.where(valid, merged.mean_logit, zero),
        merged.weighted_logit_sum,
        argmax,
        local.stats,
    )


def _empty_rows(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    want_entropy: bool,
    want_argmax: bool,
) -> Rows:
    """Rows of a shard without columns: lse = -inf, everything else zero."""
    dtype = torch.float64 if e.dtype == torch.float64 else torch.float32
    lse = empty_shard_rows(e, c, bias, dtype)
    zero = torch.zeros_like(lse)
    return Rows(
        nll=lse,
        lse=lse,
        mean_logit=zero if want_entropy else None,
        weighted_logit_sum=None if class_weight is None else zero,
        argmax=torch.full_like(lse, -1, dtype=torch.int64) if want_argmax else None,
    )


@torch.no_grad()
def _chosen_logit(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    head: Head,
) -> Tensor:
    """[N] capped logit of one column per row; -inf where a shard has none.

    A row-wise dot product, the same function on every rank: equal columns tie exactly, as they do
    in one process.
    """
    if not c.shape[0]:
        return e.new_full(columns.shape, -torch.inf, dtype=torch.float64)
    parts = []
    for block, index in zip(e.split(_ARGMAX_ROWS), columns.split(_ARGMAX_ROWS), strict=True):
        index = index.clamp(min=0)
        a = head.logit_scale * (block.float() * c[index].float()).sum(-1)
        if bias is not None:
            a = a + bias[index].float()
        parts.append(a if head.softcap is None else head.softcap * torch.tanh(a / head.softcap))
    return torch.cat(parts).double().nan_to_num(nan=-torch.inf)


def _merge_argmax(logit: Tensor, column: Tensor, shard: VocabShard) -> Tensor:
    """[N] int64 id of the largest logit over the shards, the lowest id on ties."""
    ids = torch.where(column >= 0, column + shard.start, shard.vocab_size)
    logits, ids = gather_ranks(torch.stack((logit, ids.double())), shard.group).unbind(1)
    best = logits == logits.amax(0)
    return torch.where(best, ids, shard.vocab_size).amin(0).long()
