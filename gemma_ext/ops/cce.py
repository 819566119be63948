"""Linear cross-entropy: losses of an LM head that never hold the N x V logits.

Everything is composed in plain torch from the [N] vectors of `cce_rows` (nll, lse, mean logit),
each differentiable, so one pair of kernels serves every loss:

    loss_n = t_n [ (1 - a) w_y nll_n + (a / V) sum_v w_v (lse_n - s_nv) + z lse_n^2 ]

with a = label smoothing, w = class weights, z = z-loss weight, t = token weights.

| impl        | gradient                                             | logits         |
|-------------|------------------------------------------------------|----------------|
| "auto"      | filtered where that is accurate and pays, else exact | never held     |
| "cce"       | as "auto"; never the reference                       | never held     |
| "exact"     | every logit, rounded to the dtype of e in 16 bits,   | never held     |
|             | also on its way to a float32 bias                    |                |
| "reference" | every logit, plain torch                             | N x V, float32 |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemma_ext.ops import _cce_inputs as inputs
from gemma_ext.ops import _cce_kernels
from gemma_ext.ops._cce_losses import (
    FilterStats,
    LinearCrossEntropyOutput,
    assemble,
    smoothing_weights,
    weigh_tokens,
)
from gemma_ext.ops.vocab_state import VocabState
from gemma_ext.reference import cce as reference
from gemma_ext.reference.cce import Rows

__all__ = [
    "FilterStats",
    "LinearCrossEntropyOutput",
    "Rows",
    "cce_rows",
    "linear_cross_entropy",
    "linear_logprobs",
]


def cce_rows(
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
    impl: str = "auto",
    state: VocabState | None = None,
    want_entropy: bool = False,
    want_argmax: bool = False,
    missing_target: str = "error",
    label_offset: int = 0,
) -> Rows:
    """Differentiable per-row quantities of a head; the layer every loss here is built on.

    Args:
        e: [N, D]; c: [V, D]; targets: [N]; bias: [V] or None.
        class_weight: [V]; asks for `weighted_logit_sum` and makes the backward exact.
        missing_target: "error", or "none" to accept labels outside [0, V) as rows without a target
            in this shard of the vocabulary (nll = lse).
        label_offset: added to the flat position of a label that an error names.

    Returns:
        Rows of float32 [N] vectors, zero in ignored rows.
    """
    if missing_target not in ("error", "none"):
        raise ValueError(f"expected missing_target to be 'error' or 'none', got {missing_target!r}")
    inputs.check_state(state, c.shape[0], e.device)
    e, c, bias = inputs.to_autocast(e, c, bias)
    options = {
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
        "ignore_index": ignore_index,
        "class_weight": class_weight,
        "want_entropy": want_entropy,
        "want_argmax": want_argmax,
        "missing_target": missing_target,
    }
    if impl == "reference":
        return _call(reference.rows, label_offset, e, c, targets, bias, **options)
    mode = "exact" if _is_exact(impl, filter_eps) or class_weight is not None else "filter"
    return _call(
        _cce_kernels.rows,
        label_offset,
        e,
        c,
        targets,
        bias,
        filter_eps=filter_eps,
        mode=mode,
        state=state,
        **options,
    )


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int | bool = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    impl: str = "auto",
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weight: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    return_entropy: bool = False,
    return_argmax: bool = False,
    return_stats: bool = False,
    state: VocabState | None = None,
) -> Tensor | LinearCrossEntropyOutput:
    """Cross-entropy of softcap(logit_scale * e @ c.T + bias) / temperature against `targets`.

    Under autocast e, c and bias are computed in the autocast dtype, as `F.linear` does, so that
    float32 e and c lose bits and c may differ from e in dtype; sums and the loss are float32.

    Memory beside the gradients of e and c: O(N * V / 256) for the statistics of the forward, a few
    panels of logits, never N x V (except impl="reference").

    Args:
        e: [..., T, D] hidden states, float32, bfloat16 or float16. Ignored rows may hold anything.
        c: [V, D] classifier, the `lm_head.weight` of a causal LM.
        targets: [..., T] int32 or int64 labels.
        bias: [V], added before the cap.
        ignore_index: label of positions that take no part; may lie inside [0, V).
        softcap: logits become softcap * tanh(logits / softcap) (30.0 for Gemma 2).
        reduction: "mean", "sum" or "none". "mean" divides by sum token_weights * weight[targets]
            over the positions not ignored (their count, without weights).
        shift: position t is scored against target t + shift of the same sequence; True means 1.
            The first `shift` labels are not looked at; with T <= shift nothing is scored.
        return_lse, return_entropy, return_argmax, return_stats: return a
            `LinearCrossEntropyOutput` with these fields.
        filter_eps: gradient strips of 256 columns whose largest probability is below this are
            replaced by their tile means; "auto" keeps the error near bfloat16 rounding, None and
            0 turn the filter off.
        impl: see the table of `gemma_ext.ops.cce`.
        label_smoothing: share of the loss spread over the vocabulary, in [0, 1]; makes the
            backward exact.
        z_loss: weight of lse^2.
        weight: [V] class weights. token_weights: [..., T], shifted like `targets`.
        num_items_in_batch: with "mean", divides the sum instead (gradient accumulation); 0 is
            taken as 1.
        state: `VocabState` with a vocabulary order and profile carried between calls.

    Returns:
        The float32 loss, or a `LinearCrossEntropyOutput`. With every position ignored the loss is
        0 and all gradients are zero, never NaN.

    Raises:
        TypeError, ValueError: an argument that does not fit; a label outside [0, V) is named with
            its flat position in `targets`. Compiled code raises the op's RuntimeError instead,
            which counts positions after the shift.

    On CUDA nothing here waits for the device, forward or backward (except impl="reference"), so a
    step may be captured into a CUDA graph. A label outside [0, V) cannot be reported then: it makes
    the loss NaN. With GEMMA_EXT_CHECK_LABELS=1 in the environment it is looked for first, at the
    cost of a synchronisation per call, and raises as on the CPU.

    Example:
        >>> loss = linear_cross_entropy(hidden, lm_head.weight, labels, softcap=30.0, shift=True)
    """
    inputs.check_problem(e, c, targets, bias, impl, filter_eps)
    inputs.check_scalars(softcap, temperature, logit_scale, ignore_index)
    inputs.check_vector("weight", weight, c.shape[0], e.device)
    inputs.check_loss(
        reduction, label_smoothing, token_weights, targets, num_items_in_batch, z_loss
    )
    inputs.check_state(state, c.shape[0], e.device)

    e, c, bias = inputs.to_autocast(e, c, bias)
    tokens = weigh_tokens(
        e,
        targets,
        shift=shift,
        ignore_index=ignore_index,
        reduction=reduction,
        weight=weight,
        token_weights=token_weights,
        num_items_in_batch=num_items_in_batch,
    )
    head = {
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
        "ignore_index": ignore_index,
    }
    rows_e = e.reshape(-1, e.shape[-1])
    if (
        impl != "reference"
        # gradients stored before a loss scale is applied would underflow in float16
        and e.dtype != torch.float16
        and reduction != "none"
        and not label_smoothing
        and not (return_lse or return_entropy or return_argmax)
        and _needs_grad(e, c, bias)
        and not _needs_grad(weight, token_weights, num_items_in_batch)
        and (_is_exact(impl, filter_eps) or _may_skip(state, filter_eps))
    ):
        loss, _, _ = _call(
            _cce_kernels.fused_loss,
            tokens.steps,
            rows_e,
            c,
            tokens.labels,
            bias,
            tokens.class_coef,
            z_loss * tokens.coef,
            **head,
        )
        if return_stats:
            return LinearCrossEntropyOutput(loss=loss, stats=FilterStats(None))
        return loss

    smoothing = smoothing_weights(tokens, c.shape[0], weight, label_smoothing)
    rows = cce_rows(
        rows_e,
        c,
        tokens.labels,
        bias,
        class_weight=smoothing,
        filter_eps=filter_eps,
        impl=impl,
        state=state,
        want_entropy=return_entropy,
        want_argmax=return_argmax,
        label_offset=tokens.steps,
        **head,
    )
    return assemble(
        tokens,
        rows,
        smoothing,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        return_lse=return_lse,
        return_entropy=return_entropy,
        return_argmax=return_argmax,
        return_stats=return_stats,
    )


def linear_logprobs(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int | bool = 0,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    filter_eps: float | str | None = "auto",
    impl: str = "auto",
    state: VocabState | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, for RL and scoring.

    Arguments and memory as in `linear_cross_entropy`.

    Returns:
        (logprobs, entropy), float32 [..., T - shift], both differentiable, 0 where ignored.
    """
    inputs.check_problem(e, c, targets, bias, impl, filter_eps)
    inputs.check_scalars(softcap, temperature, logit_scale, ignore_index)
    tokens = weigh_tokens(
        e,
        targets,
        shift=shift,
        ignore_index=ignore_index,
        reduction="none",
        weight=None,
        token_weights=None,
        num_items_in_batch=None,
    )
    rows = cce_rows(
        e.reshape(-1, e.shape[-1]),
        c,
        tokens.labels,
        bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        ignore_index=ignore_index,
        filter_eps=filter_eps,
        impl=impl,
        state=state,
        want_entropy=True,
        label_offset=tokens.steps,
    )
    entropy = tokens.unflatten(rows.lse - rows.mean_logit)
    return tokens.unflatten(-rows.nll), entropy


def _call(call: Callable[..., Any], label_offset: int, *args: Any, **options: Any) -> Any:
    """Call a kernel or its twin; the position of a refused label is `label_offset` further on."""
    if torch.compiler.is_compiling():
        return call(*args, **options)
    try:
        return call(*args, **options)
    except (RuntimeError, ValueError) as error:
        message = str(error).splitlines()[0]
        start = message.find("expected targets in ")
        if start < 0:
            raise
    label, _, position = message[start:].partition(" at flat position ")
    raise ValueError(f"{label} at flat position {int(position) + label_offset}")


def _is_exact(impl: str, filter_eps: float | str | None) -> bool:
    return impl == "exact" or not filter_eps


def _may_skip(state: VocabState | None, filter_eps: float | str | None) -> bool:
    # a traced graph takes the same path in every call
    compiling = torch.compiler.is_compiling()
    return state is not None and filter_eps == "auto" and not compiling and state.skip()


def _needs_grad(*tensors: object) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in tensors
    )
