"""The cce ops as torch sees them: fakes, derivatives, FLOPs; and the calls on top.

`cce_forward` gives [N] vectors and what `cce_backward` samples by; `cce_fused` computes a weighted
scalar loss and its gradients together, in three matrix products.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gemma_ext._loader import find_op
from gemma_ext.ops._derivatives import apply, refuse_derivatives
from gemma_ext.ops.cce.head import Head
from gemma_ext.ops.cce.loss import Rows

_ops = torch.ops.gemma_ext
_TILE = 256
_HEAD = ("softcap", "logit_scale", "temperature", "ignore_index")


def _names(op: str) -> list[str]:
    return [argument.name for argument in find_op(op)._schema.arguments]


def record(op: str, *more: str) -> type:
    """A named tuple of the arguments of `op`, and `more`; None unless given."""
    names = [*_names(op), *more]
    return namedtuple(op, names, defaults=[None] * len(names))


_Forward = record("cce_forward")
_Backward = record("cce_backward")
_Fused = record("cce_fused")
_Differentiable = record("cce_forward", "seed")
Forwarded = namedtuple(
    "Forwarded", "nll lse lse_low mean class_sum argmax masses summary log_squares average"
)
"""What `cce_forward` returns."""


def forward(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    **options: Any,
) -> Forwarded:
    """`cce_forward`, without derivatives."""
    tensors = {"e": e, "c": c, "targets": targets, "bias": bias, "class_weight": class_weight}
    return Forwarded(*_ops.cce_forward(**tensors, **options))


def rows(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    *,
    tau: float,
    seed: int = 0,
    class_weight: Tensor | None = None,
    want_entropy: bool = False,
    want_argmax: bool = False,
    want_stats: bool = False,
    want_moments: bool = False,
    allow_missing: bool = False,
    lean: bool = False,
) -> Rows:
    """Differentiable rows of e [N, D] under c [V, D], on the compiled kernels.

    `tau` is that of `Method`; with `allow_missing` a label outside [0, V) is no target.
    """
    wants_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (e, c, bias)
    )
    out = Forwarded(
        *apply(
            CceRows,
            *_Differentiable(
                e=e,
                c=c,
                targets=targets,
                bias=bias,
                class_weight=class_weight,
                **head.scalars(),
                allow_missing=allow_missing,
                # masses are for a backward that may leave strips out
                filter_eps=tau if wants_grad or want_stats else 0.0,
                want_mean=want_entropy,
                want_argmax=want_argmax,
                lean=lean,
                want_moments=want_moments,
                seed=seed,
            ),
        )
    )
    return Rows(
        nll=out.nll,
        lse=out.lse,
        mean_logit=out.mean if want_entropy else None,
        weighted_logit_sum=out.class_sum if class_weight is not None else None,
        argmax=out.argmax if want_argmax else None,
        stats=out.summary,
        log_sum_sq_probs=out.log_squares if want_moments else None,
        average_logit=out.average if want_moments else None,
    )


def fused_loss(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    *,
    nll_coef: Tensor,
    lse2_coef: Tensor,
    lean: bool = False,
) -> Tensor:
    """sum_n nll_coef_n nll_n + lse2_coef_n lse_n^2.

    Gradients are computed here, not in the backward, which only scales them: three matrix products
    instead of four.
    """
    loss, *_ = apply(
        CceFusedLoss,
        *_Fused(
            e=e,
            c=c,
            targets=targets,
            bias=bias,
            nll_coef=nll_coef.detach().float(),
            lse2_coef=lse2_coef.detach().float(),
            **head.scalars(),
            lean=lean,
            need_e=e.requires_grad,
            need_c=c.requires_grad,
            need_bias=bias is not None and bias.requires_grad,
        ),
    )
    return loss


class CceRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        x = _Differentiable(*args)._asdict()
        del x["seed"]
        return tuple(forward(**x))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, out = _Differentiable(*inputs), Forwarded(*output)
        ctx.mark_non_differentiable(
            out.lse_low, out.argmax, out.masses, out.summary, out.log_squares, out.average
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x.e, x.c, x.targets, x.bias, x.class_weight, *out)
        ctx.options = {name: getattr(x, name) for name in (*_HEAD, "allow_missing", "lean", "seed")}
        ctx.want_mean = x.want_mean

    @staticmethod
    def backward(ctx, *grads):
        e, c, targets, bias, class_weight, *out = ctx.saved_tensors
        d, needs = Forwarded(*grads), _Differentiable(*ctx.needs_input_grad)
        de, dc, dbias = gradients(
            e,
            c,
            targets,
            bias,
            class_weight,
            Forwarded(*out),
            # a traced graph passes zeros for the outputs that are empty
            d._replace(
                mean=d.mean if ctx.want_mean else None,
                class_sum=d.class_sum if class_weight is not None else None,
            ),
            needs=(needs.e, needs.c, needs.bias),
            **ctx.options,
        )
        # a plain tuple: torch.compile drops the gradients of any other
        return tuple(_Differentiable(e=de, c=dc, bias=dbias))


def gradients(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    out: Forwarded,
    d: Forwarded,
    *,
    needs: tuple[bool, bool, bool],
    scale: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dE, dC and dbias of rows `out` with upstream gradients `d`, None for what nobody needs.

    `scale` [N] is the size of a row's gradient where c is a part of the vocabulary.
    """
    zero = torch.zeros_like(out.lse)
    need_e, need_c, need_bias = needs
    de, dc, dbias = _ops.cce_backward(
        e=e,
        c=c,
        targets=targets,
        bias=bias,
        class_weight=class_weight,
        nll=out.nll,
        lse=out.lse,
        lse_low=out.lse_low,
        mean=out.mean,
        masses=out.masses,
        summary=out.summary,
        scale=scale,
        d_nll=zero if d.nll is None else d.nll,
        d_lse=zero if d.lse is None else d.lse,
        d_mean=d.mean,
        d_class=d.class_sum,
        **options,
        need_e=need_e,
        need_c=need_c,
        need_bias=need_bias,
    )
    return (
        de if need_e else None,
        dc if need_c else None,
        dbias.to(bias.dtype) if need_bias else None,
    )


class CceFusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _ops.cce_fused(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x = _Fused(*inputs)
        _, *rest = output
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x.e, x.c, x.targets, x.bias, x.nll_coef, x.lse2_coef)
        names = (*_HEAD, "lean", "need_e", "need_c", "need_bias")
        ctx.options = {name: getattr(x, name) for name in names}
        ctx.grads = rest[-3:]

    @staticmethod
    def backward(ctx, d_loss, *_):
        if d_loss is None:
            return tuple(_Fused())
        e, c, targets, bias, nll_coef, lse2_coef = ctx.saved_tensors
        tensors = {"e": e, "c": c, "targets": targets, "bias": bias}
        coefs = {"nll_coef": nll_coef, "lse2_coef": lse2_coef}
        grads = ctx.grads
        if grads is None or torch.is_grad_enabled():
            # with a graph of their own, which refuses to be differentiated
            grads = _ops.cce_fused(**tensors, **coefs, **ctx.options)[3:]
        if torch.compiler.is_compiling() or type(d_loss) is not Tensor or torch.is_grad_enabled():
            # a tracer's stand-in has no value to look at
            grads = [g * d_loss for g in grads]
        else:
            # Handed over without a copy of dC, so only once: a second backward through a retained
            # graph computes them again.
            ctx.grads = None
            for g in grads:
                _ops.cce_scale_(g, d_loss)  # which leaves a factor of 1 alone
        de, dc, dbias = grads
        named = _Fused(
            e=de if ctx.options["need_e"] else None,
            c=dc if ctx.options["need_c"] else None,
            bias=dbias.to(bias.dtype) if ctx.options["need_bias"] else None,
        )
        return tuple(named)


for _op in ("cce_forward", "cce_backward", "cce_fused", "cce_scale_"):
    refuse_derivatives(_op)


def _check_shapes(x: Any) -> None:
    torch._check(x.e.dim() == 2 and x.c.dim() == 2 and x.targets.dim() == 1)
    torch._check(x.e.shape[1] == x.c.shape[1])
    torch._check(x.e.shape[0] == x.targets.shape[0])
    torch._check(x.e.device == x.c.device and x.e.device == x.targets.device)


def _fake_gradients(x: Any) -> tuple[Tensor, Tensor, Tensor]:
    de = x.e.new_empty(x.e.shape if x.need_e else (0, 0))
    dc = x.c.new_empty(x.c.shape if x.need_c else (0, 0))
    dbias = x.e.new_empty(x.c.shape[0] if x.need_bias else 0, dtype=torch.float32)
    return de, dc, dbias


@torch.library.register_fake("gemma_ext::cce_forward")
def _forward_fake(*args):
    x = _Forward(*args)
    _check_shapes(x)
    n = x.e.shape[0]

    def vector(size):
        return x.e.new_empty(size, dtype=torch.float32)

    tiles = (x.c.shape[0] + _TILE - 1) // _TILE
    return (
        vector(n),
        vector(n),
        vector(n),
        vector(n if x.want_mean else 0),
        vector(n if x.class_weight is not None else 0),
        x.e.new_empty(n if x.want_argmax else 0, dtype=torch.int64),
        x.e.new_empty(
            (1 + x.want_mean, tiles, n) if x.filter_eps else (0, 0, 0),
            # the CPU has no lean form
            dtype=torch.bfloat16 if x.lean and x.e.device.type == "cuda" else torch.float32,
        ),
        x.e.new_empty(3, dtype=torch.float64),
        vector(n if x.want_moments else 0),
        vector(n if x.want_moments else 0),
    )


@torch.library.register_fake("gemma_ext::cce_backward")
def _backward_fake(*args):
    x = _Backward(*args)
    _check_shapes(x)
    return _fake_gradients(x)


@torch.library.register_fake("gemma_ext::cce_fused")
def _fused_fake(*args):
    x = _Fused(*args)
    _check_shapes(x)
    vector = x.e.new_empty(x.e.shape[0], dtype=torch.float32)
    loss = x.e.new_empty((), dtype=torch.float32)
    return loss, vector, torch.empty_like(vector), *_fake_gradients(x)


@torch.library.register_fake("gemma_ext::cce_scale_")
def _scale_fake(x, factor):
    return None


# Two operations per multiply-add; what a backward leaves out is not known before it runs.
@register_flop_formula(_ops.cce_forward)
def _forward_flops(e_shape, c_shape, *args, **kwargs) -> int:
    return 2 * e_shape[0] * c_shape[0] * e_shape[1]


@register_flop_formula(_ops.cce_backward)
def _backward_flops(e_shape, c_shape, *args, **kwargs) -> int:
    x = _Backward(e_shape, c_shape, *args)
    return (1 + x.need_e + x.need_c) * _forward_flops(e_shape, c_shape)


@register_flop_formula(_ops.cce_fused)
def _fused_flops(e_shape, c_shape, *args, **kwargs) -> int:
    x = _Fused(e_shape, c_shape, *args)
    return (1 + x.need_e + x.need_c) * _forward_flops(e_shape, c_shape)
