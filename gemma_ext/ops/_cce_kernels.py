"""torch.library registration of the cce ops: fakes, autograd, autocast; and the calls on top.

`cce_forward` is the coarse op with autograd: [N] vectors out, `cce_backward` behind it.
`cce_fused` computes a weighted scalar loss and its gradients together, in three matrix products.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gemma_ext.ops import _devices
from gemma_ext.ops.vocab_state import VocabState
from gemma_ext.reference.cce import Rows, check_labels

_ops = torch.ops.gemma_ext
_TILE = 256
_AUTO_EPS = -1.0


def rows(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    filter_eps: float | str | None = "auto",
    mode: str = "filter",
    state: VocabState | None = None,
    want_entropy: bool = False,
    want_argmax: bool = False,
    missing_target: str = "error",
) -> Rows:
    """`gemma_ext.ops.cce.cce_rows` on the compiled kernels; mode is "filter" or "exact"."""
    eps = 0.0 if mode == "exact" else _AUTO_EPS if filter_eps == "auto" else float(filter_eps)
    head = _head(softcap, logit_scale, temperature, ignore_index)
    if missing_target == "error":
        _check_labels_if_asked(targets, c.shape[0], ignore_index)
    wants_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (e, c, bias)
    )
    order, prob = (None, None) if state is None else (state.order.clone(), state.prob.clone())
    nll, lse, mean, class_sum, argmax, _, summary = _ops.cce_forward(
        e,
        c,
        targets,
        bias,
        class_weight,
        order,
        prob,
        *head,
        missing_target == "none",
        eps,
        wants_grad,
        want_entropy,
        want_argmax,
    )
    if state is not None and wants_grad and eps:
        state.observe(e, c, targets, bias, lse, summary[3], head)
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
    nll_coef: Tensor,
    lse2_coef: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_n nll_coef_n nll_n + lse2_coef_n lse_n^2, with nll and lse [N] detached.

    Gradients are computed here, not in the backward, which only scales them: three matrix products
    instead of four.
    """
    head = _head(softcap, logit_scale, temperature, ignore_index)
    _check_labels_if_asked(targets, c.shape[0], ignore_index)
    needs = [x is not None and x.requires_grad for x in (e, c, bias)]
    coefs = [x.detach().float() for x in (nll_coef, lse2_coef)]
    loss, nll, lse, *_ = _ops.cce_fused(e, c, targets, bias, *coefs, *head, *needs)
    return loss, nll, lse


def _head(
    softcap: float | None, logit_scale: float, temperature: float, ignore_index: int
) -> tuple[float, float, float, int]:
    return float(softcap or 0.0), float(logit_scale), float(temperature), ignore_index


def _check_labels_if_asked(targets: Tensor, vocab: int, ignore_index: int) -> None:
    """What the CPU kernels do by themselves, where it costs a wait for the device."""
    if torch.compiler.is_compiling() or _devices.is_readable(targets):
        return
    if os.environ.get("GEMMA_EXT_CHECK_LABELS", "0") not in ("", "0"):
        check_labels(targets, vocab, ignore_index)


def _check_shapes(e: Tensor, c: Tensor, targets: Tensor) -> None:
    torch._check(e.dim() == 2 and c.dim() == 2 and targets.dim() == 1)
    torch._check(e.shape[1] == c.shape[1])
    torch._check(e.shape[0] == targets.shape[0])
    torch._check(e.device == c.device and e.device == targets.device)


def _gradients(
    e: Tensor, c: Tensor, need_e: bool, need_c: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    de = e.new_empty(e.shape if need_e else (0, 0))
    dc = c.new_empty(c.shape if need_c else (0, 0))
    dbias = e.new_empty(c.shape[0] if need_bias else 0, dtype=torch.float32)
    return de, dc, dbias


@torch.library.register_fake("gemma_ext::cce_forward")
def _forward_fake(
    e,
    c,
    targets,
    bias,
    class_weight,
    order,
    prob,
    softcap,
    logit_scale,
    temperature,
    ignore_index,
    allow_missing,
    filter_eps,
    want_stats,
    want_mean,
    want_argmax,
):
    _check_shapes(e, c, targets)
    n = e.shape[0]

    def vector(size):
        return e.new_empty(size, dtype=torch.float32)

    tiles = (c.shape[0] + _TILE - 1) // _TILE
    stats = (3 + want_mean, tiles, n) if want_stats else (0, 0, 0)
    return (
        vector(n),
        vector(n),
        vector(n if want_mean else 0),
        vector(n if class_weight is not None else 0),
        e.new_empty(n if want_argmax else 0, dtype=torch.int64),
        vector(stats),
        e.new_empty(4, dtype=torch.float64),
    )


@torch.library.register_fake("gemma_ext::cce_backward")
def _backward_fake(e, c, targets, *rest):
    _check_shapes(e, c, targets)
    return _gradients(e, c, *rest[-3:])


@torch.library.register_fake("gemma_ext::cce_fused")
def _fused_fake(e, c, targets, *rest):
    _check_shapes(e, c, targets)
    vector = e.new_empty(e.shape[0], dtype=torch.float32)
    loss = e.new_empty((), dtype=torch.float32)
    return loss, vector, torch.empty_like(vector), *_gradients(e, c, *rest[-3:])


@torch.library.register_fake("gemma_ext::cce_column_stats")
def _column_stats_fake(e, c, targets, *rest):
    _check_shapes(e, c, targets)
    count = e.new_empty(c.shape[0], dtype=torch.float32)
    return count, torch.empty_like(count)


def _setup_forward(ctx, inputs, output):
    e, c, targets, bias, class_weight, order, prob, *options = inputs
    nll, lse, mean, _, argmax, stats, summary = output
    ctx.mark_non_differentiable(argmax, stats, summary)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        e, c, targets, bias, class_weight, order, prob, nll, lse, mean, stats, summary
    )
    ctx.head = tuple(options[:5])
    ctx.want_mean = options[-2]


def _backward(ctx, d_nll, d_lse, d_mean, d_class, *_):
    e, c, targets, bias, class_weight, order, prob, nll, lse, mean, stats, summary = (
        ctx.saved_tensors
    )
    zero = torch.zeros_like(lse)
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    de, dc, dbias = _ops.cce_backward(
        e,
        c,
        targets,
        bias,
        class_weight,
        order,
        prob,
        nll,
        lse,
        mean,
        stats,
        summary,
        zero if d_nll is None else d_nll,
        zero if d_lse is None else d_lse,
        # a traced graph passes zeros for the outputs that are empty
        d_mean if ctx.want_mean else None,
        d_class if class_weight is not None else None,
        *ctx.head,
        *needs,
    )
    return (
        de if needs[0] else None,
        dc if needs[1] else None,
        None,
        dbias.to(bias.dtype) if needs[2] else None,
        *[None] * 12,
    )


torch.library.register_autograd("gemma_ext::cce_forward", _backward, setup_context=_setup_forward)


def _setup_fused(ctx, inputs, output):
    _, nll, lse, de, dc, dbias = output
    ctx.mark_non_differentiable(nll, lse, de, dc, dbias)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6])
    ctx.options = tuple(inputs[6:])
    ctx.grads = (de, dc, dbias)


def _fused_backward(ctx, d_loss, *_):
    if d_loss is None:
        return (None,) * 13
    if ctx.grads is None:
        grads = _ops.cce_fused(*ctx.saved_tensors, *ctx.options)[3:]
    else:
        grads = ctx.grads
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
    need_e, need_c, need_bias = ctx.options[-3:]
    return (
        de if need_e else None,
        dc if need_c else None,
        None,
        dbias.to(ctx.saved_tensors[3].dtype) if need_bias else None,
        *[None] * 9,
    )


torch.library.register_autograd("gemma_ext::cce_fused", _fused_backward, setup_context=_setup_fused)
