"""Weighted sums of models, in place or differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_ext.ops.souping import inputs, op, plain
from gemma_ext.ops.souping.impls import is_reference
from gemma_ext.ops.souping.parts import Part
from gemma_ext.ops.souping.rules import Numbers
from gemma_ext.ops.souping.sums import dots


def soup_(
    parts: Sequence[Part],
    weights: Numbers,
    *,
    scale: float | Sequence[float] | Tensor = 1.0,
    rows: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    wide: bool = False,
    impl: str = "auto",
) -> None:
    """out = base + scale * sum_m w_m (x_m - base), or without a base sum_m w_m x_m.

    Sums are float32 over terms in ascending order, so that the order of the models changes no bit,
    and rounded once; memory is that of the parts.

    Args:
        parts: T parts of M models; `out` may be the base or a source.
        weights: one number, [M], or [T, M]; not normalised.
        scale: one number or [T]; without a base it is ignored.
        rows: every row of the last dimension has weights and a scale of its own: T counts the rows
            of all parts.
        rounding: "nearest" even, or "stochastic": to one of the two neighbours in bfloat16 or
            float16, by random numbers of (seed, name, position).
        wide: sums in float64.
        impl: "auto", or "reference" for plain torch.

    Raises:
        ValueError, TypeError: shapes, dtypes or counts that do not fit; one sentence says which.
    """
    models = inputs.checked(parts, out=True)
    inputs.check_rounding(rounding)
    count = inputs.row_count(parts) if rows else len(parts)
    weights = inputs.table("weights", weights, count, models)
    scale = inputs.column("scale", scale, count)
    if is_reference(impl, inputs.device_of(parts)):
        plain.soup_(parts, weights, scale, rows, rounding, seed)
    else:
        op.soup_(parts, weights, scale, rows, rounding, seed, wide)


def soup(
    parts: Sequence[Part],
    weights: Tensor,
    *,
    scale: float | Tensor = 1.0,
    impl: str = "auto",
) -> list[Tensor]:
    """`soup_` into new tensors, differentiable once in weights, scale, sources and bases.

    Args:
        parts: T parts of M models; their `out` is not looked at.
        weights: [M] or [T, M].
        scale: one number, or a tensor of one or [T].

    Returns:
        T tensors in the dtype of the base, or without one of the first source. The gradient of the
        weights is sum_i dout_i delta_m,i in float64, added up in a fixed order.
    """
    models = inputs.checked(parts)
    count = len(parts)
    if not isinstance(weights, Tensor):
        raise TypeError(f"expected weights to be a tensor, got {type(weights).__name__}")
    if weights.shape not in ((models,), (count, models)):
        raise ValueError(
            f"expected weights to be [{models}] or [{count}, {models}], got {list(weights.shape)}"
        )
    scale = torch.as_tensor(scale, dtype=weights.dtype, device=weights.device)
    if scale.shape not in ((), (1,), (count,)):
        raise ValueError(f"expected scale to be one number or [{count}], got {list(scale.shape)}")
    tensors = [x for part in parts for x in (*part.sources, part.base)]
    return list(
        _Soup.apply(parts, impl, weights.expand(count, models), scale.expand(count), *tensors)
    )


class _Soup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, impl, weights, scale, *tensors):
        outs = [
            torch.empty_like(part.sources[0] if part.base is None else part.base) for part in parts
        ]
        written = [
            Part([x.detach() for x in part.sources], _detached(part.base), out, part.name)
            for part, out in zip(parts, outs, strict=True)
        ]
        soup_(written, weights.detach(), scale=scale.detach(), impl=impl)
        ctx.save_for_backward(weights, scale, *tensors)
        ctx.impl = impl
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        weights, scale, *tensors = ctx.saved_tensors
        count, models = weights.shape
        parts = [
            Part(
                tensors[t * (models + 1) : t * (models + 1) + models],
                tensors[(t + 1) * (models + 1) - 1],
            )
            for t in range(count)
        ]
        along = None
        if any(ctx.needs_input_grad[2:4]):
            along = dots(parts, grads, impl=ctx.impl).to(weights.device)
        based = torch.tensor([part.base is not None for part in parts], device=weights.device)
        factor = torch.where(based, scale, 1.0).double()
        d_weights = d_scale = None
        if ctx.needs_input_grad[2]:
            d_weights = (factor.unsqueeze(-1) * along).to(weights.dtype)
        if ctx.needs_input_grad[3]:
            d_scale = torch.where(based, (weights.double() * along).sum(-1), 0.0).to(scale.dtype)
        wanted = iter(ctx.needs_input_grad[4:])
        d_tensors = []
        for t, part in enumerate(parts):
            slopes = factor[t] * weights[t].double()
            for x, slope in zip(
                (*part.sources, part.base), (*slopes, 1 - slopes.sum()), strict=True
            ):
                d_tensors.append(
                    (grads[t] * slope.to(grads[t])).to(x.dtype) if next(wanted) else None
                )
        return None, None, d_weights, d_scale, *d_tensors


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
