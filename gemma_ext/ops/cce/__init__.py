"""Linear cross-entropy: losses of an LM head that never hold the N x V logits.

Everything is composed in plain torch from the [N] vectors of `cce_rows` (nll, lse, mean logit),
each differentiable, so one pair of kernels serves every loss:

    loss_n = t_n [ (1 - a) w_y nll_n + (a / V) sum_v w_v (lse_n - s_nv) + z lse_n^2 ]

with a = label smoothing, w = class weights, z = z-loss weight, t = token weights.

| impl        | gradient                                             | logits         |
|-------------|------------------------------------------------------|----------------|
| "auto"      | sampled where that is accurate and pays, else exact  | never held     |
| "cce"       | as "auto"; never the reference                       | never held     |
| "exact"     | every logit, rounded to the dtype of e in 16 bits,   | never held     |
|             | also on its way to a float32 bias                    |                |
| "reference" | every logit, plain torch                             | N x V, float32 |
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.ops.cce import op
from gemma_ext.ops.cce.head import Head
from gemma_ext.ops.cce.inputs import Method, check_labels, check_problem, to_autocast
from gemma_ext.ops.cce.logprobs import LinearLogprobsOutput, linear_logprobs
from gemma_ext.ops.cce.loss import (
    FilterStats,
    LinearCrossEntropyOutput,
    LossTerms,
    Rows,
    Wanted,
    assemble,
)
from gemma_ext.ops.cce.rows import enter, rows_of_head
from gemma_ext.ops.vocab_state import warn_ignored

__all__ = [
    "FilterStats",
    "Head",
    "LinearCrossEntropyOutput",
    "LinearLogprobsOutput",
    "LossTerms",
    "Method",
    "Rows",
    "cce_rows",
    "linear_cross_entropy",
    "linear_logprobs",
    "rows_of_head",
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
    filter_seed: int = 0,
    memory: str = "default",
    state: object = None,
    want_entropy: bool = False,
    want_argmax: bool = False,
    want_moments: bool = False,
    missing_target: str = "error",
) -> Rows:
    """Differentiable per-row quantities of a head; the layer every loss here is built on.

    Args:
        e: [N, D]; c: [V, D]; targets: [N]; bias: [V] or None.
        class_weight: [V]; asks for `weighted_logit_sum` and makes the backward exact.
        want_entropy, want_argmax, want_moments: ask for `mean_logit`, `argmax`, and for
            `log_sum_sq_probs` and `average_logit`.
        missing_target: "error", or "none" to accept labels outside [0, V) as rows without a target
            in this shard of the vocabulary (nll = lse).

    Returns:
        Rows of float32 [N] vectors, zero in ignored rows.

    Raises:
        TypeError, ValueError: as `linear_cross_entropy`.
    """
    if missing_target not in ("error", "none"):
        raise ValueError(f"expected missing_target to be 'error' or 'none', got {missing_target!r}")
    head = Head(softcap, logit_scale, temperature, ignore_index)
    if state is not None:
        warn_ignored("state")
    method = Method(impl, filter_eps, filter_seed, memory)
    check_problem(e, c, targets, bias, method)
    if missing_target == "error":
        check_labels(targets, c.shape[0], ignore_index, wait=method.materialises)
    e, c, bias = to_autocast(e, c, bias)
    return rows_of_head(
        e,
        c,
        targets,
        bias,
        head,
        method,
        class_weight=class_weight,
        want_entropy=want_entropy,
        want_argmax=want_argmax,
        want_moments=want_moments,
        allow_missing=missing_target == "none",
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
    filter_seed: int = 0,
    memory: str = "default",
    state: object = None,
) -> Tensor | LinearCrossEntropyOutput:
    """Cross-entropy of softcap(logit_scale * e @ c.T + bias) / temperature against `targets`.

    Under autocast e, c and bias are computed in the autocast dtype, as `F.linear` does, so that
    float32 e and c lose bits and c may differ from e in dtype; sums and the loss are float32.

    Memory beside the gradients of e and c: O(N * V / 256) for the masses of a sampled backward, a
    few panels of logits, never N x V (except impl="reference").

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
        filter_eps: gradient strips (one row, 256 columns) whose probability is below this are
            computed with a chance of their probability over it, and weighed by its inverse: no
            bias, and an error like rounding's. "auto" is exact for float32 and chooses the
            threshold for 16 bits by the error it predicts; None and 0 are exact.
        impl: see the table of `gemma_ext.ops.cce`.
        label_smoothing: share of the loss spread over the vocabulary, in [0, 1]; makes the
            backward exact.
        z_loss: weight of lse^2.
        weight: [V] class weights. token_weights: [..., T], shifted like `targets`.
        num_items_in_batch: with "mean", divides the sum instead (gradient accumulation); 0 is
            taken as 1.
        filter_seed: other strips are drawn for every seed; the same call draws the same ones.
        memory: "lean" holds a quarter of the memory on CUDA (117 MB beside inputs and gradients
            where "default" holds 421: N 8192, V 256000, D 2304 in bfloat16) for a little time. The
            loss is that of "default" to the last bits of float32; other strips are drawn. The CPU
            has one form.
        state: ignored, goes with the next release.

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
    head = Head(softcap, logit_scale, temperature, ignore_index)
    if state is not None:
        warn_ignored("state")
    method = Method(impl, filter_eps, filter_seed, memory)
    terms = LossTerms(
        reduction=reduction,
        shift=shift,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        weight=weight,
        token_weights=token_weights,
        num_items_in_batch=num_items_in_batch,
    )
    wanted = Wanted(return_lse, return_entropy, return_argmax, return_stats)
    tokens, e, c, bias = enter(e, c, targets, bias, head, terms, method)
    if _may_fuse(e, c, bias, terms, wanted, method):
        loss = op.fused_loss(
            e,
            c,
            tokens.labels,
            bias,
            head,
            nll_coef=tokens.class_coef,
            lse2_coef=z_loss * tokens.coef,
            lean=method.lean,
        )
        return LinearCrossEntropyOutput(loss, stats=FilterStats(None)) if wanted.stats else loss

    smoothing = terms.smoothing(c.shape[0], tokens.coef)
    rows = rows_of_head(
        e,
        c,
        tokens.labels,
        bias,
        head,
        method,
        class_weight=smoothing,
        want_entropy=wanted.entropy,
        want_argmax=wanted.argmax,
        want_stats=wanted.stats,
    )
    return assemble(tokens, rows, smoothing, terms, wanted)


def _may_fuse(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    terms: LossTerms,
    wanted: Wanted,
    method: Method,
) -> bool:
    """Whether the gradients of e, c and bias alone are asked for, of one exact number."""
    return (
        not method.materialises
        # gradients stored before a loss scale is applied would underflow in float16
        and e.dtype != torch.float16
        and terms.reduction != "none"
        and not terms.label_smoothing
        and not (wanted.lse or wanted.entropy or wanted.argmax)
        and _needs_grad(e, c, bias)
        and not _needs_grad(terms.weight, terms.token_weights, terms.num_items_in_batch)
        and method.tau(e.dtype) == 0
        # transforms of torch.func keep no gradient from the forward for later
        and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())
    )


def _needs_grad(*tensors: object) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in tensors
    )
