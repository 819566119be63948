"""torch.library registration of the cce ops: fakes and autograd; and the calls on top.

`cce_forward` is the coarse op with autograd: [N] vectors out, `cce_backward` behind it.
`cce_fused` computes a weighted scalar loss and its gradients together, in three matrix products.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor

from gemma_ext.ops import _devices
from gemma_ext.ops.cce.head import Head
from gemma_ext.ops.cce.loss import Rows
from gemma_ext.ops.vocab_state import VocabState

_ops = torch.ops.gemma_ext
_TILE = 256


def _arguments(op: str) -> type:
    """A named tuple of the arguments of `op`, None unless given."""
    names = [argument.name for argument in getattr(_ops, op).default._schema.arguments]
    return namedtuple(op, names, defaults=[None] * len(names))


_Forward, _Backward, _Fused, _ColumnStats = map(
    _arguments, ("cce_forward", "cce_backward", "cce_fused", "cce_column_stats")
)


def rows(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    *,
    eps: float,
    class_weight: Tensor | None = None,
    state: VocabState | None = None,
    want_entropy: bool = False,
    want_argmax: bool = False,
    allow_missing: bool = False,
) -> Rows:
    """Differentiable rows of e [N, D] under c [V, D], on the compiled kernels.

    `eps` is that of `Method`; with `allow_missing` a label outside [0, V) is no target.
    """
    wants_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (e, c, bias)
    )
    nll, lse, mean, class_sum, argmax, _, summary = _ops.cce_forward(
        e=e,
        c=c,
        targets=targets,
        bias=bias,
        class_weight=class_weight,
        order=None if state is None else state.order.clone(),
        prob=None if state is None else state.prob.clone(),
        **head.scalars(),
        allow_missing=allow_missing,
        filter_eps=eps,
        want_stats=wants_grad,
        want_mean=want_entropy,
        want_argmax=want_argmax,
    )
    if state is not None and wants_grad and eps:
        state.observe(e, c, targets, bias, lse, summary[3], head.scalars())
    return Rows(
        nll=nll,
        lse=lse,
        mean_logit=mean if want_entropy else None,
        weighted_logit_sum=class_sum if class_weight is not None else None,
        argmax=argmax if want_argmax else None,
        stats=summary,
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
) -> Tensor:
    """sum_n nll_coef_n nll_n + lse2_coef_n lse_n^2.

    Gradients are computed here, not in the backward, which only scales them: three matrix products
    instead of four.
    """
    loss, *_ = _ops.cce_fused(
        e=e,
        c=c,
        targets=targets,
        bias=bias,
        nll_coef=nll_coef.detach().float(),
        lse2_coef=lse2_coef.detach().float(),
        **head.scalars(),
        need_e=e.requires_grad,
        need_c=c.requires_grad,
        need_bias=bias is not None and bias.requires_grad,
    )
    return loss


def _check_shapes(x: Any) -> None:
    torch._check(x.e.dim() == 2 and x.c.dim() == 2 and x.targets.dim() == 1)
    torch._check(x.e.shape[1] == x.c.shape[1])
    torch._check(x.e.shape[0] == x.targets.shape[0])
    torch._check(x.e.device == x.c.device and x.e.device == x.targets.device)


def _gradients(x: Any) -> tuple[Tensor, Tensor, Tensor]:
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
        vector(n if x.want_mean else 0),
        vector(n if x.class_weight is not None else 0),
        x.e.new_empty(n if x.want_argmax else 0, dtype=torch.int64),
        vector((3 + x.want_mean, tiles, n) if x.want_stats else (0, 0, 0)),
        x.e.new_empty(4, dtype=torch.float64),
    )


@torch.library.register_fake("gemma_ext::cce_backward")
def _backward_fake(*args):
    x = _Backward(*args)
    _check_shapes(x)
    return _gradients(x)


@torch.library.register_fake("gemma_ext::cce_fused")
def _fused_fake(*args):
    x = _Fused(*args)
    _check_shapes(x)
    vector = x.e.new_empty(x.e.shape[0], dtype=torch.float32)
    loss = x.e.new_empty((), dtype=torch.float32)
    return loss, vector, torch.empty_like(vector), *_gradients(x)


@torch.library.register_fake("gemma_ext::cce_column_stats")
def _column_stats_fake(*args):
    x = _ColumnStats(*args)
    _check_shapes(x)
    count = x.e.new_empty(x.c.shape[0], dtype=torch.float32)
    return count, torch.empty_like(count)


_HEAD = ("softcap", "logit_scale", "temperature", "ignore_index")
_SAVED = ("e", "c", "targets", "bias", "class_weight", "order", "prob")


def _named(x: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(x, name) for name in names}


def _setup_forward(ctx, inputs, output):
    x = _Forward(*inputs)
    nll, lse, mean, _, argmax, stats, summary = output
    ctx.mark_non_differentiable(argmax, stats, summary)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*_named(x, _SAVED).values(), nll, lse, mean, stats, summary)
    ctx.options = _named(x, (*_HEAD, "allow_missing"))
    ctx.want_mean = x.want_mean


def _backward(ctx, d_nll, d_lse, d_mean, d_class, *_):
    *inputs, nll, lse, mean, stats, summary = ctx.saved_tensors
    x = dict(zip(_SAVED, inputs, strict=True))
    needs = _Forward(*ctx.needs_input_grad)
    zero = torch.zeros_like(lse)
    de, dc, dbias = _ops.cce_backward(
        **x,
        nll=nll,
        lse=lse,
        mean=mean,
        stats=stats,
        summary=summary,
        d_nll=zero if d_nll is None else d_nll,
        d_lse=zero if d_lse is None else d_lse,
        # a traced graph passes zeros for the outputs that are empty
        d_mean=d_mean if ctx.want_mean else None,
        d_class=d_class if x["class_weight"] is not None else None,
        **ctx.options,
        need_e=needs.e,
        need_c=needs.c,
        need_bias=needs.bias,
    )
    return _Forward(
        e=de if needs.e else None,
        c=dc if needs.c else None,
        bias=dbias.to(x["bias"].dtype) if needs.bias else None,
    )


torch.library.register_autograd("gemma_ext::cce_forward", _backward, setup_context=_setup_forward)


def _setup_fused(ctx, inputs, output):
    x = _Fused(*inputs)
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    tensors = {name: value for name, value in x._asdict().items() if isinstance(value, Tensor)}
    ctx.save_for_backward(*tensors.values())
    ctx.names = tuple(tensors)
    ctx.options = {name: value for name, value in x._asdict().items() if name not in tensors}
    ctx.grads = rest[-3:]


def _fused_backward(ctx, d_loss, *_):
    if d_loss is None:
        return _Fused()
    x = _Fused(**dict(zip(ctx.names, ctx.saved_tensors, strict=True)), **ctx.options)
    grads = ctx.grads
    if grads is None:
        _, _, _, *grads = _ops.cce_fused(**x._asdict())
    if type(d_loss) is not Tensor:  # a tracer's stand-in has no value to look at
        grads = [g * d_loss for g in grads]
    else:
        # Handed over without a copy of dC, so only once: a second backward through a retained
        # graph computes them again.
        ctx.grads = None
        if not _devices.is_readable(d_loss):
            # [1], because a factor without dimensions would first be rounded to the dtype of g
            grads = [g.mul_(d_loss.reshape(1)) for g in grads]
        elif not bool(d_loss == 1):
            grads = [g.mul_(d_loss) for g in grads]
    de, dc, dbias = grads
    return _Fused(
        e=de if x.need_e else None,
        c=dc if x.need_c else None,
        bias=dbias.to(x.bias.dtype) if x.need_bias else None,
    )


torch.library.register_autograd("gemma_ext::cce_fused", _fused_backward, setup_context=_setup_fused)
