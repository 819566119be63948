"""The encode ops as torch sees them: fakes, derivatives, FLOPs."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gemma_ext._loader import find_op
from gemma_ext.ops._derivatives import apply, refuse_derivatives
from gemma_ext.ops.sae.decode_op import REMEDY
from gemma_ext.reference.sae_products import row_sparse

_ops = torch.ops.gemma_ext


def _record(op: str, *more: str, results: bool = False) -> type:
    """A named tuple of the arguments of `op` and `more`, or of its results; None unless given."""
    schema = find_op(op)._schema
    names = [x.name for x in (schema.returns if results else schema.arguments)] + list(more)
    return namedtuple(op, names, defaults=[None] * len(names))


def topk(*args: Any, sparse_grad: bool = False) -> tuple[Tensor, ...]:
    """`sae_topk`, differentiable in x [N, D], weight and bias."""
    return apply(SaeTopk, *args, sparse_grad)


def group_max(*args: Any, sparse_grad: bool = False) -> tuple[Tensor, ...]:
    """`sae_group_max`, differentiable."""
    return apply(SaeGroupMax, *args, sparse_grad)


def batch_topk(*args: Any, sparse_grad: bool = False) -> tuple[Tensor, ...]:
    """`sae_batch_topk`, differentiable."""
    return apply(SaeBatchTopk, *args, sparse_grad)


def threshold(*args: Any, sparse_grad: bool = False) -> tuple[Tensor, ...]:
    """`sae_threshold`, differentiable."""
    return apply(SaeThreshold, *args, sparse_grad)


def _setup(op: str) -> Any:
    arguments, results = _record(op, "sparse_grad"), _record(op, results=True)

    def setup_context(ctx, inputs, output):
        x, found = arguments(*inputs)._asdict(), results(*output)._asdict()
        differentiable = ("values", "aux_values")
        ctx.mark_non_differentiable(*(t for n, t in found.items() if n not in differentiable))
        ctx.set_materialize_grads(False)
        lists = [found.get(name) for name in ("indices", "offsets", "counts", "aux_indices")]
        ctx.save_for_backward(x["x"], x["weight"], x["bias"], x.get("aux_mask"), *lists)
        ctx.sparse_grad = x["sparse_grad"]

    return setup_context


def _backward(op: str) -> Any:
    arguments, results = _record(op, "sparse_grad"), _record(op, results=True)

    def backward(ctx, *grads):
        d, needs = results(*grads)._asdict(), arguments(*ctx.needs_input_grad)
        x, weight, bias, mask, indices, offsets, counts, aux_indices = ctx.saved_tensors
        lists = []
        if d["values"] is not None:
            padded = indices.dim() == 2
            # a row that found no room has NaN values, and a gradient in each of its places
            counts = counts.clamp(max=indices.shape[1]) if padded and counts is not None else None
            lists.append((d["values"], indices, None if padded else offsets, counts))
        if mask is not None and d["aux_values"] is not None:
            counts = mask.sum().clamp(max=aux_indices.shape[1]).expand(x.shape[0])
            lists.append((d["aux_values"], aux_indices, None, counts))
        found: list[Tensor | None] = [None, None, None]
        for entries in _joined(lists):
            more = _gradients(x, weight, needs, ctx.sparse_grad, *entries)
            for i, (a, b) in enumerate(zip(found, more, strict=True)):
                found[i] = b if a is None else a if b is None else _sum(a, b)
        like = (x, weight, bias)
        dx, d_weight, d_bias = (
            g if g is None else g.to(t.dtype) for g, t in zip(found, like, strict=True)
        )
        return tuple(arguments(x=dx, weight=d_weight, bias=d_bias))

    return backward


def _joined(lists: list[tuple]) -> list[tuple]:
    """One list of entries instead of two where every row of the first is full: one [F, D] sum."""
    if len(lists) < 2 or lists[0][2] is not None or lists[0][3] is not None:
        return lists
    (values, indices, *_), (aux_values, aux_indices, _, counts) = lists
    both = torch.cat([values, aux_values], 1), torch.cat([indices, aux_indices], 1)
    return [(*both, None, counts + indices.shape[1])]


def _sum(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_sparse:
        return a + b
    # torch adds no sparse tensors of float16
    rows = torch.cat([a._indices(), b._indices()], 1)
    values = torch.cat([a._values(), b._values()])
    return torch.sparse_coo_tensor(rows, values, a.shape, check_invariants=False)


def _gradients(
    x: Tensor,
    weight: Tensor,
    needs: Any,
    sparse: bool,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, weight and bias of entries p = x . w + b, None for what nobody needs."""
    codes = {"values": values, "indices": indices, "offsets": offsets, "counts": counts}
    dx = _ops.sae_decode(**codes, weight=weight, bias=None) if needs.x else None
    d_weight = d_bias = None
    # a narrow weight's gradient takes half the memory of the float32 sums
    wide = needs.weight and not sparse and weight.dtype == torch.float32
    if needs.weight and not wide:
        options = {"scale": None, "unit_norm": False, "rows_only": sparse}
        wanted = {"need_values": False, "need_weight": True, "need_bias": False}
        _, d_weight, _, touched = _ops.sae_decode_backward(
            **codes, weight=weight, grad=x, **options, **wanted
        )
        if sparse:
            d_weight = row_sparse(touched, d_weight, weight.shape[0])
    if wide or needs.bias:
        rows = x if wide else x[:, :0]
        sums, d_bias = _ops.sae_scatter(**codes, rows=rows, features=weight.shape[0])
        d_weight = sums if wide else d_weight
    return dx, d_weight, d_bias if needs.bias else None


class SaeTopk(torch.autograd.Function):
    forward = staticmethod(lambda *args: _ops.sae_topk(*args[:-1]))
    setup_context = staticmethod(_setup("sae_topk"))
    backward = staticmethod(_backward("sae_topk"))


class SaeGroupMax(torch.autograd.Function):
    forward = staticmethod(lambda *args: _ops.sae_group_max(*args[:-1]))
    setup_context = staticmethod(_setup("sae_group_max"))
    backward = staticmethod(_backward("sae_group_max"))


class SaeBatchTopk(torch.autograd.Function):
    forward = staticmethod(lambda *args: _ops.sae_batch_topk(*args[:-1]))
    setup_context = staticmethod(_setup("sae_batch_topk"))
    backward = staticmethod(_backward("sae_batch_topk"))


class SaeThreshold(torch.autograd.Function):
    forward = staticmethod(lambda *args: _ops.sae_threshold(*args[:-1]))
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
