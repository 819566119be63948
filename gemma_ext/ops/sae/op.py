"""The encode ops as torch sees them: fakes, derivatives, FLOPs."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gemma_ext.ops._derivatives import apply, refuse_derivatives
from gemma_ext.ops.sae.decode_op import REMEDY

_ops = torch.ops.gemma_ext


def _record(op: str, *, results: bool = False) -> type:
    """A named tuple of the arguments of `op`, or of its results; None unless given."""
    schema = getattr(_ops, op).default._schema
    names = [x.name for x in (schema.returns if results else schema.arguments)]
    return namedtuple(op, names, defaults=[None] * len(names))


def topk(*args: Any) -> tuple[Tensor, ...]:
    """`sae_topk`, differentiable in x [N, D], weight and bias."""
    return apply(SaeTopk, *args)


def group_max(*args: Any) -> tuple[Tensor, ...]:
    """`sae_group_max`, differentiable."""
    return apply(SaeGroupMax, *args)


def batch_topk(*args: Any) -> tuple[Tensor, ...]:
    """`sae_batch_topk`, differentiable."""
    return apply(SaeBatchTopk, *args)


def threshold(*args: Any) -> tuple[Tensor, ...]:
    """`sae_threshold`, differentiable."""
    return apply(SaeThreshold, *args)


def _setup(op: str) -> Any:
    arguments, results = _record(op), _record(op, results=True)

    def setup_context(ctx, inputs, output):
        x, found = arguments(*inputs)._asdict(), results(*output)._asdict()
        differentiable = ("values", "aux_values")
        ctx.mark_non_differentiable(*(t for n, t in found.items() if n not in differentiable))
        ctx.set_materialize_grads(False)
        lists = [found.get(name) for name in ("indices", "offsets", "counts", "aux_indices")]
        ctx.save_for_backward(x["x"], x["weight"], x["bias"], x.get("aux_mask"), *lists)

    return setup_context


def _backward(op: str) -> Any:
    arguments, results = _record(op), _record(op, results=True)

    def backward(ctx, *grads):
        d, needs = results(*grads)._asdict(), arguments(*ctx.needs_input_grad)
        x, weight, bias, mask, indices, offsets, counts, aux_indices = ctx.saved_tensors
        lists = []
        if d["values"] is not None:
            padded = indices.dim() == 2
            # a row that found no room has NaN values, and gradients in none of its places
            counts = counts.clamp(max=indices.shape[1]) if padded and counts is not None else None
            lists.append((d["values"], indices, None if padded else offsets, counts))
        if mask is not None and d["aux_values"] is not None:
            counts = mask.sum().clamp(max=aux_indices.shape[1]).expand(x.shape[0])
            lists.append((d["aux_values"], aux_indices, None, counts))
        dx, d_weight, d_bias = _gradients(x, weight, bias, lists, needs)
        return tuple(arguments(x=dx, weight=d_weight, bias=d_bias))

    return backward


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, lists: list[tuple], needs: Any
) -> list[Tensor | None]:
    """Those of x, weight and bias of entries p = x . w + b, None for what nobody needs."""
    total: list[Tensor | None] = [None, None, None]
    for values, indices, offsets, counts in lists:
        codes = {"values": values, "indices": indices, "offsets": offsets, "counts": counts}
        found: list[Tensor | None] = [None, None, None]
        if needs.x:
            found[0] = _ops.sae_decode(**codes, weight=weight, bias=None)
        if needs.weight or needs.bias:
            rows = x if needs.weight else x[:, :0]
            sums, totals = _ops.sae_scatter(**codes, rows=rows, features=weight.shape[0])
            found[1] = sums if needs.weight else None
            found[2] = totals if needs.bias else None
        total = [a if b is None else b if a is None else a + b for a, b in zip(total, found)]
    like = (x, weight, bias)
    return [t if t is None else t.to(x.dtype) for t, x in zip(total, like)]


class SaeTopk(torch.autograd.Function):
    forward = staticmethod(lambda *args: _ops.sae_topk(*args))
    setup_context = staticmethod(_setup("sae_topk"))
    backward = staticmethod(_backward("sae_topk"))


class SaeGroupMax(torch.autograd.Function):
    forward = staticmethod(lambda *args: _ops.sae_group_max(*args))
    setup_context = staticmethod(_setup("sae_group_max"))
    backward = staticmethod(_backward("sae_group_max"))


class SaeBatchTopk(torch.autograd.Function):
    forward = staticmethod(lambda *args: _ops.sae_batch_topk(*args))
    setup_context = staticmethod(_setup("sae_batch_topk"))
    backward = staticmethod(_backward("sae_batch_topk"))


class SaeThreshold(torch.autograd.Function):
    forward = staticmethod(lambda *args: _ops.sae_threshold(*args))
    setup_context = staticmethod(_setup("sae_threshold"))
    backward = staticmethod(_backward("sae_threshold"))


_OPS = ("sae_topk", "sae_group_max", "sae_batch_topk", "sae_threshold")
for _op in _OPS:
    refuse_derivatives(_op, REMEDY)


def _list(x: Tensor, *shape: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


def _aux(x: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return _list(x, x.shape[0], 0 if mask is None else k)


@torch.library.register_fake("gemma_ext::sae_topk")
def _topk_fake(x, weight, bias, scale, aux_mask, k, k_aux, by_magnitude):
    return *_list(x, x.shape[0], k), *_aux(x, aux_mask, k_aux)


@torch.library.register_fake("gemma_ext::sae_group_max")
def _group_max_fake(x, weight, bias, groups):
    return _list(x, x.shape[0], groups)


@torch.library.register_fake("gemma_ext::sae_batch_topk")
def _batch_topk_fake(x, weight, bias, scale, aux_mask, total, k_aux):
    offsets = x.new_empty(x.shape[0] + 1, dtype=torch.int64)
    least = x.new_empty((), dtype=torch.float32)
    return *_list(x, total), offsets, least, *_aux(x, aux_mask, k_aux)


@torch.library.register_fake("gemma_ext::sae_threshold")
def _threshold_fake(x, weight, bias, scale, limit, aux_mask, inclusive, capacity, k_aux):
    n = x.shape[0]
    if capacity < 0:
        entries = _list(x, torch.library.get_ctx().new_dynamic_size())
    else:
        entries = _list(x, n, capacity)
    offsets = x.new_empty(n + 1 if capacity < 0 else 0, dtype=torch.int64)
    counts = x.new_empty(n, dtype=torch.int64)
    return *entries, offsets, counts, *_aux(x, aux_mask, k_aux)


@register_flop_formula([getattr(_ops, _op) for _op in _OPS])
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    """Two operations per multiply-add of the bare product."""
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]
