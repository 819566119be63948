"""The function in which trl 1.16 scores tokens, on the kernels of this package."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from gemma_ext.ops._derivatives import once
from gemma_ext.ops.cce import op
from gemma_ext.ops.cce.head import Head
from gemma_ext.ops.cce.inputs import Method, autocast_is_on, check_labels, check_problem
from gemma_ext.ops.cce.loss import Rows

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class ChunkedLogProbFunction(torch.autograd.Function):
    """trl's function of this name, argument for argument, without its tiles of logits.

    The logits stay in float32 from the product to the sums; trl stores them in the dtype of
    `hidden` first. Rows whose upstream gradients are all 0 take no part in the backward.

    `apply` takes

        hidden: [N, H] float32, bfloat16 or float16; N may be 0. float64 is computed in float32, as
            trl's sums are.
        weight: [V, H]; bias: [V] or None; of any dtype: they are computed in the dtype of autocast
            where that is on, else in that of `hidden`. Gradients have the dtypes of the arguments.
        targets: [N] ids in [0, V), or -100 in rows that take no part.
        temperature: divides the logits last, after `logit_scale` and `final_logit_softcapping`.
        chunk_size: not looked at.
        outputs: of `OUTPUTS`; log-probabilities are always given.

    and returns (log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), [N] each, float32 and
    bool, None where not among `outputs`. The first two are differentiable.

    Attributes:
        method: how gradients are computed, of `gemma_ext.ops.cce.Method`.

    Raises:
        TypeError, ValueError: as `gemma_ext.linear_logprobs`.
    """

    method = Method()

    @classmethod
    def apply(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int = 32768,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        tensors = (hidden, weight, bias)
        if not torch.is_grad_enabled():  # nothing is kept for a backward then
            tensors = tuple(None if x is None else x.detach() for x in tensors)
        head = Head(final_logit_softcapping, logit_scale, temperature)
        return super().apply(*tensors, targets, head, tuple(outputs), cls.method)

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        outputs: tuple[str, ...],
        method: Method,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = _dtype_of(hidden)
        e, c, b = _computed(hidden, weight, bias, ctx.dtype, head.logit_scale)
        check_problem(e, c, targets, b, method)
        check_labels(targets, c.shape[0], head.ignore_index)
        out = op.forward(
            e,
            c,
            targets,
            b,
            None,
            **head.scalars(),
            allow_missing=False,
            filter_eps=method.tau(ctx.dtype) if any(ctx.needs_input_grad[:3]) else 0.0,
            want_mean="entropy" in outputs,
            want_argmax="is_top1" in outputs,
            lean=method.lean,
            want_moments="log_sum_sq_probs" in outputs or "mean_logits" in outputs,
        )
        ctx.save_for_backward(hidden, weight, bias, targets, *out)
        ctx.options = {**head.scalars(), "allow_missing": False, "lean": method.lean}
        ctx.options["seed"] = method.seed
        rows = Rows(out.nll, out.lse, out.mean, argmax=out.argmax)
        valid = targets != head.ignore_index
        given = {
            "entropy": lambda: rows.entropy(),
            "log_sum_sq_probs": lambda: out.log_squares,
            "mean_logits": lambda: out.average,
            "is_top1": lambda: rows.is_top1(targets) & valid,
        }
        entropy, *fixed = (given[name]() if name in outputs else None for name in OUTPUTS)
        ctx.mark_non_differentiable(*(x for x in fixed if x is not None))
        return -out.nll, entropy, *fixed

    @staticmethod
    @once
    def backward(
        ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, *out = ctx.saved_tensors
        nothing = op.Forwarded(*[None] * len(op.Forwarded._fields))
        d = nothing._replace(
            nll=None if d_logprobs is None else -d_logprobs,
            lse=d_entropy,
            mean=None if d_entropy is None else -d_entropy,
        )
        with _gathered(weight, bias):
            e, c, b = _computed(hidden, weight, bias, ctx.dtype, ctx.options["logit_scale"])
            de, dc, dbias = op.gradients(
                *(e, c, targets, b, None, op.Forwarded(*out), d),
                needs=ctx.needs_input_grad[:3],
                **ctx.options,
            )
        if dbias is not None:
            dbias = (dbias * ctx.options["logit_scale"]).to(bias.dtype)
        return (
            None if de is None else de.to(hidden.dtype),
            None if dc is None else dc.to(weight.dtype),
            dbias,
            *(None, None, None, None),
        )


def _dtype_of(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if autocast_is_on(kind) else hidden.dtype
    return torch.float32 if dtype == torch.float64 else dtype


def _computed(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in `dtype`; the bias scaled, for trl scales its sum with the product."""
    if bias is not None:
        bias = bias.to(dtype).float() * scale
    return hidden.to(dtype), weight.to(dtype), bias


def _gathered(weight: Tensor, bias: Tensor | None) -> contextlib.AbstractContextManager:
    """A head that ZeRO-3 of deepspeed has spread over the ranks, whole."""
    if not hasattr(weight, "ds_id"):
        return contextlib.nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(weight, bias)
