"""Nested errors as torch sees them: fakes, derivatives, and the call on top."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.ops._derivatives import apply, refuse_derivatives
from gemma_ext.ops.sae.codes import Codes
from gemma_ext.ops.sae.decode_op import (
    REMEDY,
    as_bias,
    lists_of,
    needs_of,
    record,
    save,
    saved,
    tokens_of,
    value_gradient,
    wide,
)

_ops = torch.ops.gemma_ext
_Nested = record("sae_nested", "unit_norm")
_NestedBackward = record("sae_nested_backward")


def nested(
    codes: Codes,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    widths: list[int],
    unit_norm: bool,
) -> Tensor:
    """squared [N, levels]; no widths for levels by place in the list."""
    given = _Nested(**lists_of(codes), weight=weight, bias=bias, target=target, widths=widths)
    return apply(SaeNested, *given._replace(unit_norm=unit_norm))


class SaeNested(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        x = _Nested(*args)._asdict()
        del x["unit_norm"]
        return _ops.sae_nested(**x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x = _Nested(*inputs)
        save(ctx, x, x.target)
        ctx.widths, ctx.unit_norm = x.widths, x.unit_norm

    @staticmethod
    def backward(ctx, d_squared):
        if d_squared is None:
            return tuple(_Nested())
        lists, weight, bias, (target,) = saved(ctx)
        needs = _Nested(*ctx.needs_input_grad)
        d_values, d_weight, d_bias, d_target = _ops.sae_nested_backward(
            **lists,
            weight=weight,
            bias=bias,
            target=target,
            widths=ctx.widths,
            d_squared=d_squared,
            unit_norm=ctx.unit_norm,
            **needs_of(needs),
            need_target=needs.target,
        )
        return tuple(
            _Nested(
                values=d_values if needs.values else None,
                weight=d_weight if needs.weight else None,
                bias=as_bias(d_bias, bias) if needs.bias else None,
                target=d_target if needs.target else None,
            )
        )


for _op in ("sae_nested", "sae_nested_backward"):
    refuse_derivatives(_op, REMEDY)


@torch.library.register_fake("gemma_ext::sae_nested")
def _nested_fake(*args):
    x = _Nested(*args)
    return wide(x.values, tokens_of(x), len(x.widths) or x.values.shape[1])


@torch.library.register_fake("gemma_ext::sae_nested_backward")
def _nested_backward_fake(*args):
    x = _NestedBackward(*args)
    width = x.weight.shape[1]
    return (
        value_gradient(x),
        x.weight.new_empty(x.weight.shape if x.need_weight else (0, 0)),
        wide(x.values, width if x.need_bias else 0),
        x.target.new_empty(x.target.shape if x.need_target else (0, 0)),
    )
