"""The products as torch sees them: fakes, derivatives, FLOPs; and the calls on top."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gemma_ext._loader import find_op
from gemma_ext.ops._derivatives import apply, refuse_derivatives
from gemma_ext.ops.sae.codes import Codes
from gemma_ext.reference.sae_products import row_sparse

_ops = torch.ops.gemma_ext
REMEDY = "gemma_ext.ops.sae with impl='reference' has derivatives of every order and mode"


def record(op: str, *more: str) -> type:
    """A named tuple of the arguments of `op`, and `more`; None unless given."""
    names = [a.name for a in find_op(op)._schema.arguments] + list(more)
    return namedtuple(op, names, defaults=[None] * len(names))


_Decode = record("sae_decode", "unit_norm", "sparse_grad")
_Error = record("sae_decode_error", "unit_norm", "sparse_grad")
_Backward = record("sae_decode_backward")
_Scatter = record("sae_scatter")
_LISTS = ("values", "indices", "offsets", "counts")


def lists_of(codes: Codes) -> dict[str, Tensor | None]:
    return {name: getattr(codes, name) for name in _LISTS}


def decode(
    codes: Codes, weight: Tensor, bias: Tensor | None, unit_norm: bool, sparse_grad: bool
) -> Tensor:
    """[N, D] of `codes`, whatever their shape."""
    options = {"unit_norm": unit_norm, "sparse_grad": sparse_grad}
    return apply(SaeDecode, *_Decode(**lists_of(codes), weight=weight, bias=bias, **options))


def decode_error(
    codes: Codes,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    unit_norm: bool,
    sparse_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(residual [N, D], squared [N])."""
    options = {"unit_norm": unit_norm, "sparse_grad": sparse_grad}
    given = _Error(**lists_of(codes), weight=weight, bias=bias, target=target, **options)
    return apply(SaeDecodeError, *given)


def dots(codes: Codes, weight: Tensor, rows: Tensor) -> Tensor:
    """<rows_n, weight[i]> of every entry."""
    needs = {"need_values": True, "need_weight": False, "need_bias": False}
    return _backward(lists_of(codes), weight, rows, None, **needs)[0]


def scatter(codes: Codes, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(f^T rows [F, D], f^T 1 [F])."""
    return _ops.sae_scatter(**lists_of(codes), rows=rows, features=codes.features)


def _backward(
    lists: dict[str, Tensor | None],
    weight: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    *,
    need_values: bool,
    need_weight: bool,
    need_bias: bool,
    unit_norm: bool = False,
    sparse_grad: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of values, weight and bias of G_n = scale_n grad_n, None for what nobody needs."""
    d_values, d_weight, d_bias, touched = _ops.sae_decode_backward(
        **lists,
        weight=weight,
        grad=grad,
        scale=scale,
        unit_norm=unit_norm,
        rows_only=sparse_grad,
        need_values=need_values,
        need_weight=need_weight,
        need_bias=need_bias,
    )
    if sparse_grad and need_weight:
        d_weight = row_sparse(touched, d_weight, weight.shape[0])
    return (
        d_values if need_values else None,
        d_weight if need_weight else None,
        d_bias if need_bias else None,
    )


def needs_of(needs: Any) -> dict[str, bool]:
    return {f"need_{name}": getattr(needs, name) for name in ("values", "weight", "bias")}


def save(ctx: Any, x: Any, *more: Tensor) -> None:
    ctx.save_for_backward(*(getattr(x, name) for name in _LISTS), x.weight, x.bias, *more)
    ctx.set_materialize_grads(False)


def saved(ctx: Any) -> tuple[dict[str, Tensor | None], Tensor, Tensor | None, list[Tensor]]:
    *lists, weight, bias = ctx.saved_tensors[: len(_LISTS) + 2]
    return dict(zip(_LISTS, lists, strict=True)), weight, bias, ctx.saved_tensors[len(lists) + 2 :]


def as_bias(d_bias: Tensor | None, bias: Tensor | None) -> Tensor | None:
    return d_bias if d_bias is None else d_bias.to(bias.dtype)


class SaeDecode(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        x = _Decode(*args)._asdict()
        del x["unit_norm"], x["sparse_grad"]
        return _ops.sae_decode(**x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x = _Decode(*inputs)
        save(ctx, x)
        ctx.options = {"unit_norm": x.unit_norm, "sparse_grad": x.sparse_grad}

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return tuple(_Decode())
        lists, weight, bias, _ = saved(ctx)
        needs = needs_of(_Decode(*ctx.needs_input_grad))
        d_values, d_weight, d_bias = _backward(lists, weight, grad, None, **needs, **ctx.options)
        return tuple(_Decode(values=d_values, weight=d_weight, bias=as_bias(d_bias, bias)))


class SaeDecodeError(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        x = _Error(*args)._asdict()
        del x["unit_norm"], x["sparse_grad"]
        return _ops.sae_decode_error(**x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x = _Error(*inputs)
        save(ctx, x, output[0])
        ctx.options = {"unit_norm": x.unit_norm, "sparse_grad": x.sparse_grad}
        ctx.target_dtype = x.target.dtype

    @staticmethod
    def backward(ctx, d_residual, d_squared):
        if d_residual is None and d_squared is None:
            return tuple(_Error())
        lists, weight, bias, (residual,) = saved(ctx)
        needs = _Error(*ctx.needs_input_grad)
        # of the reconstruction: -(d_residual + 2 d_squared residual)
        if d_residual is None:
            grad, scale = residual, -2 * d_squared
        else:
            grad, scale = -d_residual, None
            if d_squared is not None:
                grad = grad - 2 * d_squared.unsqueeze(-1) * residual
        d_values, d_weight, d_bias = _backward(
            lists, weight, grad, scale, **needs_of(needs), **ctx.options
        )
        d_target = None
        if needs.target:
            d_target = -grad if scale is None else -scale.unsqueeze(-1) * grad
            d_target = d_target.to(ctx.target_dtype)
        found = _Error(values=d_values, weight=d_weight, bias=as_bias(d_bias, bias))
        return tuple(found._replace(target=d_target))


for _op in ("sae_decode", "sae_decode_error", "sae_decode_backward", "sae_scatter"):
    refuse_derivatives(_op, REMEDY)


def tokens_of(x: Any) -> int:
    return x.values.shape[0] if x.offsets is None else x.offsets.shape[0] - 1


def wide(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def value_gradient(x: Any) -> Tensor:
    return x.values.new_empty(x.values.shape if x.need_values else (0,))


@torch.library.register_fake("gemma_ext::sae_decode")
def _decode_fake(*args):
    x = _Decode(*args)
    return x.weight.new_empty(tokens_of(x), x.weight.shape[1])


@torch.library.register_fake("gemma_ext::sae_decode_error")
def _error_fake(*args):
    x = _Error(*args)
    return x.weight.new_empty(tokens_of(x), x.weight.shape[1]), wide(x.values, tokens_of(x))


@torch.library.register_fake("gemma_ext::sae_decode_backward")
def _backward_fake(*args):
    x = _Backward(*args)
    features, width = x.weight.shape
    touched = 0
    if x.need_weight and x.rows_only:
        features = touched = torch.library.get_ctx().new_dynamic_size()
    return (
        value_gradient(x),
        x.weight.new_empty((features, width) if x.need_weight else (0, 0)),
        wide(x.values, width if x.need_bias else 0),
        x.values.new_empty((touched,), dtype=torch.int64),
    )


@torch.library.register_fake("gemma_ext::sae_scatter")
def _scatter_fake(*args):
    x = _Scatter(*args)
    return wide(x.values, x.features, x.rows.shape[1]), wide(x.values, x.features)


# Two operations per multiply-add of every entry that there is room for.
@register_flop_formula([_ops.sae_decode, _ops.sae_decode_error])
def _decode_flops(values, indices, offsets, counts, weight, *args, **kwargs) -> int:
    return 2 * _size(values) * weight[1]


@register_flop_formula(_ops.sae_decode_backward)
def _backward_flops(values, indices, offsets, counts, weight, *args, **kwargs) -> int:
    x = _Backward(values, indices, offsets, counts, weight, *args)
    return 2 * _size(values) * weight[1] * (x.need_values + x.need_weight)


def _size(shape: Any) -> int:
    return shape[0] * shape[1] if len(shape) == 2 else shape[0]
