"""The divergence ops as torch sees them: fakes, derivatives, FLOPs; and the call on top."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gemma_ext.ops._derivatives import apply, refuse_derivatives
from gemma_ext.ops.cce.head import Head
from gemma_ext.ops.cce.op import record

KINDS = ("forward_kl", "reverse_kl", "jsd", "tvd")
"""In the order of the ops' `kind`."""
REMEDY = (
    "gemma_ext.linear_divergence with impl='reference' has derivatives of every order and mode, "
    "and holds the logits"
)
_ops = torch.ops.gemma_ext
_TILE = 256
_STATES = 5

_Forward = record("cce_divergence_forward")
_Backward = record("cce_divergence_backward")
_Differentiable = record("cce_divergence_forward", "seed")
_HEADS = ("e", "c", "bias", "teacher_e", "teacher_c", "teacher_bias", "targets")
# numbers that forward and backward take
_NUMBERS = [x for x in _Forward._fields if x in _Backward._fields and x not in _HEADS]
Forwarded = namedtuple(
    "Forwarded", ["divergence", "nll", "lse", "teacher_nll", "state", "masses", "summary"]
)
"""What `cce_divergence_forward` returns."""


def rows(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    teacher_e: Tensor,
    teacher_c: Tensor,
    teacher_bias: Tensor | None,
    targets: Tensor,
    head: Head,
    teacher: Head,
    *,
    kind: str,
    beta: float,
    tau: float,
    seed: int = 0,
    want_stats: bool = False,
) -> Forwarded:
    """Differentiable rows of a student e [N, D], c [V, D] against a teacher, by the kernels."""
    wants_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (e, c, bias)
    )
    theirs = teacher.scalars()
    return Forwarded(
        *apply(
            CceDivergence,
            *_Differentiable(
                e=e,
                c=c,
                bias=bias,
                teacher_e=teacher_e,
                teacher_c=teacher_c,
                teacher_bias=teacher_bias,
                targets=targets,
                kind=KINDS.index(kind),
                beta=float(beta),
                **head.scalars(),
                teacher_softcap=theirs["softcap"],
                teacher_logit_scale=theirs["logit_scale"],
                teacher_temperature=theirs["temperature"],
                # masses are for a backward that may leave strips out
                filter_eps=tau if wants_grad or want_stats else 0.0,
                seed=seed,
            ),
        )
    )


class CceDivergence(torch.autograd.Function):
    generate_vmap_rule = True
    remedy = REMEDY

    @staticmethod
    def forward(*args):
        return _ops.cce_divergence_forward(*args[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, out = _Differentiable(*inputs), Forwarded(*output)
        ctx.mark_non_differentiable(out.teacher_nll, out.state, out.masses, out.summary)
        ctx.set_materialize_grads(False)
        heads = (getattr(x, name) for name in _HEADS)
        ctx.save_for_backward(*heads, out.nll, out.lse, out.state, out.masses, out.summary)
        ctx.options = {name: getattr(x, name) for name in (*_NUMBERS, "seed")}

    @staticmethod
    def backward(ctx, *grads):
        saved = _Backward(*ctx.saved_tensors)
        d, needs = Forwarded(*grads), _Differentiable(*ctx.needs_input_grad)
        zero = torch.zeros_like(saved.lse)
        de, dc, dbias = _ops.cce_divergence_backward(
            *ctx.saved_tensors,
            d_divergence=zero if d.divergence is None else d.divergence,
            d_nll=zero if d.nll is None else d.nll,
            d_lse=zero if d.lse is None else d.lse,
            **ctx.options,
            need_e=needs.e,
            need_c=needs.c,
            need_bias=bool(needs.bias),
        )
        named = _Differentiable(
            e=de if needs.e else None,
            c=dc if needs.c else None,
            bias=dbias.to(saved.bias.dtype) if needs.bias else None,
        )
        return tuple(named)


for _op in ("cce_divergence_forward", "cce_divergence_backward"):
    refuse_derivatives(_op, REMEDY)


def _check_shapes(x: Any) -> None:
    torch._check(x.e.dim() == 2 and x.c.dim() == 2 and x.targets.dim() == 1)
    torch._check(x.teacher_e.dim() == 2 and x.teacher_c.dim() == 2)
    torch._check(x.e.shape[1] == x.c.shape[1])
    torch._check(x.teacher_e.shape[1] == x.teacher_c.shape[1])
    torch._check(x.c.shape[0] == x.teacher_c.shape[0])
    torch._check(x.e.shape[0] == x.targets.shape[0])
    torch._check(x.e.shape[0] == x.teacher_e.shape[0])


@torch.library.register_fake("gemma_ext::cce_divergence_forward")
def _forward_fake(*args):
    x = _Forward(*args)
    _check_shapes(x)
    n = x.e.shape[0]
    tiles = (x.c.shape[0] + _TILE - 1) // _TILE

    def floats(*size):
        return x.e.new_empty(size, dtype=torch.float32)

    return (
        *(floats(n) for _ in range(4)),
        floats(_STATES, n),
        floats(2, tiles, n) if x.filter_eps else floats(0, 0, 0),
        x.e.new_empty(3, dtype=torch.float64),
    )


@torch.library.register_fake("gemma_ext::cce_divergence_backward")
def _backward_fake(*args):
    x = _Backward(*args)
    _check_shapes(x)
    de = x.e.new_empty(x.e.shape if x.need_e else (0, 0))
    dc = x.c.new_empty(x.c.shape if x.need_c else (0, 0))
    dbias = x.e.new_empty(x.c.shape[0] if x.need_bias else 0, dtype=torch.float32)
    return de, dc, dbias


def _products(x: Any) -> tuple[int, int]:
    """FLOPs of one product of the student's head and of the teacher's."""
    one = 2 * x.e[0] * x.c[0]
    return one * x.e[1], one * x.teacher_e[1]


@register_flop_formula(_ops.cce_divergence_forward)
def _forward_flops(*shapes, **kwargs) -> int:
    x = _Forward(*shapes)
    kwargs.pop("out_shape", None)
    sweeps = 2 if KINDS[x.kind] in ("jsd", "tvd") else 1
    return sweeps * sum(_products(x))


@register_flop_formula(_ops.cce_divergence_backward)
def _backward_flops(*shapes, **kwargs) -> int:
    x = _Backward(*shapes)
    student, teacher = _products(x)
    return student + teacher + (x.need_e + x.need_c) * student
