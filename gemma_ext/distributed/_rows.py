"""Per-row quantities of a head whose vocabulary is spread over the ranks of a group."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gemma_ext.distributed._merge import (
    RowStatistics,
    empty_shard_rows,
    gather_ranks,
    merge_moments,
    merge_shards,
    reduce_gradient,
)
from gemma_ext.distributed._sampled import shard_rows
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
    want_stats: bool,
    want_moments: bool,
    reduce_e_grad: bool,
) -> Rows:
    """`gemma_ext.ops.cce.rows_of_head` over the union of the shards; the same on every rank.

    Args:
        e: [N, D], the same on every rank. c: [V_local, D]; bias, class_weight: [V_local] or None.
        targets: [N] labels in the whole vocabulary; one outside it has nll NaN.
    """
    valid = targets != head.ignore_index
    relative = targets.long() - shard.start
    owned = valid & (relative >= 0) & (relative < shard.stop - shard.start)
    nowhere = valid & ((targets < 0) | (targets >= shard.vocab_size))
    e = reduce_gradient(e, shard.group) if reduce_e_grad else e
    local_e, local_c, local_bias = to_autocast(e, c, bias)
    problem = (
        local_e,
        local_c,
        torch.where(owned, relative, torch.where(valid, _ELSEWHERE, _IGNORED)),
        local_bias,
    )
    local_head = dataclasses.replace(head, ignore_index=_IGNORED)
    wanted = {
        "class_weight": class_weight,
        "want_entropy": want_entropy,
        "want_argmax": want_argmax,
        "want_moments": want_moments,
    }
    if method.materialises:
        rows = _materialised_rows(*problem, shard, local_head, method, owned, **wanted)
    else:
        rows = shard_rows(*problem, shard, local_head, method, want_stats=want_stats, **wanted)

    zero = torch.zeros_like(rows.lse)
    argmax = None
    if want_argmax:
        logit = _chosen_logit(e, c, bias, rows.argmax, head)
        argmax = torch.where(valid, _merge_argmax(logit, rows.argmax, shard), -1)
    return rows._replace(
        nll=torch.where(valid, rows.nll, zero).masked_fill(nowhere, torch.nan),
        lse=torch.where(valid, rows.lse, zero),
        mean_logit=torch.where(valid, rows.mean_logit, zero) if want_entropy else None,
        argmax=argmax,
        log_sum_sq_probs=torch.where(valid, rows.log_sum_sq_probs, zero) if want_moments else None,
        average_logit=torch.where(valid, rows.average_logit, zero) if want_moments else None,
    )


def _materialised_rows(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    shard: VocabShard,
    head: Head,
    method: Method,
    owned: Tensor,
    *,
    class_weight: Tensor | None,
    want_entropy: bool,
    want_argmax: bool,
    want_moments: bool,
) -> Rows:
    """Rows in plain torch; argmax is that of the shard."""
    if c.shape[0]:
        local = rows_of_head(
            e,
            c,
            targets,
            bias,
            head,
            method,
            class_weight=class_weight,
            want_entropy=want_entropy,
            want_argmax=want_argmax,
            want_moments=want_moments,
            allow_missing=True,
        )
    else:
        local = _empty_rows(e, c, bias, class_weight, want_entropy, want_argmax, want_moments)
    merged = merge_shards(
        RowStatistics(
            local.lse,
            # a row owned elsewhere stays out of the subtraction, whose backward would cost its
            # gradient x_r g the rounding of g + (x_r g - g)
            torch.where(owned, local.lse - local.nll, torch.zeros_like(local.lse)),
            local.mean_logit,
            local.weighted_logit_sum,
        ),
        shard.group,
    )
    rows = Rows(
        nll=merged.lse - merged.target_logit,
        lse=merged.lse,
        mean_logit=merged.mean_logit,
        weighted_logit_sum=merged.weighted_logit_sum,
        argmax=local.argmax,
    )
    if not want_moments:
        return rows
    squares, average = merge_moments(
        (local.lse, local.log_sum_sq_probs, local.average_logit),
        c.shape[0],
        shard.vocab_size,
        shard.group,
    )
    return rows._replace(log_sum_sq_probs=squares, average_logit=average)


def _empty_rows(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    want_entropy: bool,
    want_argmax: bool,
    want_moments: bool,
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
        log_sum_sq_probs=lse.detach() if want_moments else None,
        average_logit=zero if want_moments else None,
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
