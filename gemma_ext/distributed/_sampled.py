"""Rows of a vocabulary-parallel head on the kernels, as one node of the graph.

Rank r holds the columns of its shard and knows, per row n, lse_r, the mean logit m_r under its own
softmax, its part of sum_v w_v s_nv and, where it owns the label, nll_r. With x_r = exp(lse_r - L)
the whole row has

    L = logsumexp_r lse_r      m = sum_r x_r m_r      nll = nll_r + (L - lse_r) of the owner

and the backward needs no communication: it is that of the columns of the shard, given L and m of
the row. Which strips it computes depends on x_r times their mass in the shard.
"""

from __future__ import annotations

from collections import namedtuple

import torch
import torch.distributed as dist
from torch import Tensor

from gemma_ext.distributed._merge import gather_ranks, merge_moments
from gemma_ext.distributed._shards import VocabShard
from gemma_ext.ops._derivatives import apply, once
from gemma_ext.ops.cce import Head, Method, Rows
from gemma_ext.ops.cce.op import Forwarded, forward, gradients

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: shards beside each other draw far apart

_Arguments = namedtuple(
    "_Arguments", ["e", "c", "targets", "bias", "class_weight", "shard", "seed", "head", "options"]
)


def shard_rows(
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
) -> Rows:
    """Rows of the whole vocabulary from e [N, D] and c [V_local, D]; argmax is that of the shard.

    Targets [N] count from the shard's first column; one outside the shard is no target of it.
    """
    wants_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (e, c, bias)
    )
    samples = class_weight is None and (wants_grad or want_stats)
    arguments = _Arguments(
        e=e,
        c=c,
        targets=targets,
        bias=bias,
        class_weight=class_weight,
        shard=shard,
        seed=(method.seed ^ shard.start * _GOLDEN) % 2**63,
        head={**head.scalars(), "allow_missing": True, "lean": False},
        options={
            "filter_eps": method.tau(e.dtype) if samples else 0.0,
            "want_mean": want_entropy,
            "want_argmax": want_argmax,
            "want_moments": want_moments,
        },
    )
    out = Forwarded(*apply(VocabParallelRows, *arguments))
    return Rows(
        nll=out.nll,
        lse=out.lse,
        mean_logit=out.mean if want_entropy else None,
        weighted_logit_sum=out.class_sum if class_weight is not None else None,
        argmax=out.argmax if want_argmax else None,
        stats=out.summary if c.shape[0] else None,
        log_sum_sq_probs=out.log_squares if want_moments else None,
        average_logit=out.average if want_moments else None,
    )


class VocabParallelRows(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        x = _Arguments(*args)
        call = forward if x.c.shape[0] else _no_columns
        local = call(x.e, x.c, x.targets, x.bias, x.class_weight, **x.head, **x.options)
        return tuple(_merge(local, x))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, out = _Arguments(*inputs), Forwarded(*output)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            out.lse_low, out.argmax, out.masses, out.summary, out.log_squares, out.average
        )
        ctx.save_for_backward(x.e, x.c, x.targets, x.bias, x.class_weight, *out)
        ctx.options = {**x.head, "seed": x.seed}
        ctx.want_mean = x.options["want_mean"]

    @staticmethod
    @once
    def backward(ctx, *grads):
        e, c, targets, bias, class_weight, *out = ctx.saved_tensors
        needs, d = _Arguments(*ctx.needs_input_grad), Forwarded(*grads)
        if not c.shape[0]:
            zeros = [
                torch.zeros_like(x) if wanted else None
                for x, wanted in ((e, needs.e), (c, needs.c), (bias, needs.bias))
            ]
            return _gradients_of(*zeros)
        out = Forwarded(*out)
        zero = torch.zeros_like(out.lse)
        d_nll, d_lse, d_mean = (zero if x is None else x for x in (d.nll, d.lse, d.mean))
        if not ctx.want_mean:
            d_mean = zero
        found = gradients(
            e,
            c,
            targets,
            bias,
            class_weight,
            out,
            d._replace(
                mean=d_mean if ctx.want_mean else None,
                class_sum=d.class_sum if class_weight is not None else None,
            ),
            needs=(needs.e, needs.c, needs.bias),
            # also where the label, and with it d_nll, is another shard's
            scale=torch.stack(((d_nll + d_lse + d_mean).abs(), d_nll.abs(), d_mean.abs())).amax(0),
            **ctx.options,
        )
        return _gradients_of(*found)


def _gradients_of(de: Tensor | None, dc: Tensor | None, dbias: Tensor | None) -> tuple:
    nothing = _Arguments(*[None] * len(_Arguments._fields))
    return tuple(nothing._replace(e=de, c=dc, bias=dbias))


def _no_columns(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    *,
    want_mean: bool,
    want_argmax: bool,
    want_moments: bool,
    **_: object,
) -> Forwarded:
    """What a shard without columns contributes: lse = -inf, everything else zero."""
    zero = e.new_zeros(e.shape[0], dtype=torch.float32)
    nothing = zero[:0]
    return Forwarded(
        nll=torch.full_like(zero, -torch.inf),
        lse=torch.full_like(zero, -torch.inf),
        lse_low=zero,
        mean=zero if want_mean else nothing,
        class_sum=nothing if class_weight is None else zero,
        argmax=torch.full_like(zero if want_argmax else nothing, -1, dtype=torch.int64),
        masses=zero.new_zeros(0, 0, 0),
        summary=zero.new_zeros(3, dtype=torch.float64),
        log_squares=torch.full_like(zero, -torch.inf) if want_moments else nothing,
        average=zero if want_moments else nothing,
    )


def _merge(local: Forwarded, x: _Arguments) -> Forwarded:
    """`local` with the whole vocabulary's nll, lse, mean, class_sum, and masses relative to it.

    One all-gather of three to five vectors, added in rank order in float64, so that every rank gets
    the same bits, and one more where moments are wanted. Costs 12 to 20 bytes per row and rank.
    """
    want_mean, want_class = x.options["want_mean"], x.class_weight is not None
    group = x.shard.group
    valid = x.targets != x.head["ignore_index"]
    owned = valid & (x.targets >= 0) & (x.targets < x.c.shape[0])
    vectors = [
        local.lse,
        torch.where(torch.isfinite(local.lse), local.lse_low, 0.0),
        torch.where(owned, local.nll, torch.inf),
        *([local.mean] if want_mean else []),
        *([local.class_sum] if want_class else []),
    ]
    columns = list(gather_ranks(torch.stack(vectors), group).double().unbind(1))  # [R, N] each
    lse_all = columns.pop(0) + columns.pop(0)
    wide = torch.logsumexp(lse_all, 0)
    lse = wide.float()
    shares = torch.exp(lse_all - wide)
    merged = local._replace(
        nll=(columns.pop(0) + (wide - lse_all)).amin(0).float(),
        lse=lse,
        lse_low=torch.where(torch.isfinite(lse), wide - lse.double(), 0.0).float(),
    )
    if want_mean:
        # a shard masked by a bias of -inf has no mean logit, and no share of it
        means = torch.where(shares > 0, columns.pop(0), 0.0)
        merged = merged._replace(mean=(shares * means).sum(0).float())
    if want_class:
        merged = merged._replace(class_sum=columns.pop(0).sum(0).float())
    if x.options["want_moments"]:
        squares, average = merge_moments(
            (local.lse, local.log_squares, local.average),
            x.c.shape[0],
            x.shard.vocab_size,
            group,
        )
        merged = merged._replace(log_squares=squares, average=average)
    if local.masses.numel():
        # columns of the masses are the valid rows, then nothing
        order = torch.argsort((~valid).to(torch.uint8), stable=True)
        share = shares[dist.get_rank(group)].float()[order]
        masses = local.masses * share
        if want_mean:
            # |top - m| <= |top - m_r| + |m_r - m|: a strip may be kept more often than it had to be
            masses[1] += masses[0] * (local.mean - merged.mean).abs()[order]
        merged = merged._replace(masses=masses)
    return merged
