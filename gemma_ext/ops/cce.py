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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_ext.ops import _cce_inputs as inputs
from gemma_ext.ops import _cce_kernels
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


class FilterStats(NamedTuple):
    """What the gradient filter keeps of a backward that weighs all rows the same.

    Computed by the forward, which knows no upstream gradients: token weights, class weights or a
    loss per token that is weighed later keep other strips.

    Attributes:
        values: [4] float64, the four properties in order; None where nothing is ever filtered.
    """

    values: Tensor | None

    def _at(self, index: int, unfiltered: float) -> float:
        return unfiltered if self.values is None else float(self.values[index])

    @property
    def kept_fraction(self) -> float:
        """Strips (one row, 256 columns) that are computed, over all strips of valid rows."""
        return self._at(0, 1.0)

    @property
    def dropped_mass(self) -> float:
        """Probability in dropped strips, mean over valid rows; returned through tile means."""
        return self._at(1, 0.0)

    @property
    def dropped_mass_max(self) -> float:
        """Probability in dropped strips of the row that drops most."""
        return self._at(2, 0.0)

    @property
    def eps(self) -> float:
        """Threshold in use, 0 when the backward is exact."""
        return self._at(3, 0.0)


class LinearCrossEntropyOutput(NamedTuple):
    """What `linear_cross_entropy` returns when a `return_*` flag is set; None where not asked.

    Attributes:
        loss: 0-d, or [..., max(T - shift, 0)] with reduction "none"; float32.
        lse: [..., T - shift] differentiable log-sum-exp, 0 at ignored positions.
        entropy: [..., T - shift] differentiable entropy in nats, 0 at ignored positions.
        argmax: [..., T - shift] int64 most probable id, -1 at ignored positions.
        accuracy: 0-d fraction of the positions not ignored whose argmax is the target.
        stats: what the gradient filter kept.
    """

    loss: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    accuracy: Tensor | None = None
    stats: FilterStats | None = None


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
    inputs.check_state(state, c.shape[0])
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

    Example:
        >>> loss = linear_cross_entropy(hidden, lm_head.weight, labels, softcap=30.0, shift=True)
    """
    inputs.check_problem(e, c, targets, bias, impl, filter_eps)
    inputs.check_scalars(softcap, temperature, logit_scale, ignore_index)
    inputs.check_vector("weight", weight, c.shape[0], e.device)
    inputs.check_loss(
        reduction, label_smoothing, token_weights, targets, num_items_in_batch, z_loss
    )
    inputs.check_state(state, c.shape[0])

    e, c, bias = inputs.to_autocast(e, c, bias)
    steps = inputs.resolve_shift(shift, targets)
    labels = inputs.shift_left(targets, steps, ignore_index)
    shape, flat = labels.shape, labels.reshape(-1)
    valid = flat != ignore_index
    coef, class_coef = _coefficients(e, flat, valid, weight, token_weights, steps)
    if reduction == "mean":
        items = class_coef.sum() if num_items_in_batch is None else num_items_in_batch
        scale = _reciprocal(items, coef)
        coef, class_coef = coef * scale, class_coef * scale

    head = {
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
        "ignore_index": ignore_index,
    }
    rows_e = e.reshape(-1, e.shape[-1])
    returns = return_lse or return_entropy or return_argmax or return_stats
    if (
        impl != "reference"
        and _is_exact(impl, filter_eps)
        # gradients stored before a loss scale is applied would underflow in float16
        and e.dtype != torch.float16
        and reduction != "none"
        and not label_smoothing
        and not (return_lse or return_entropy or return_argmax)
        and _needs_grad(e, c, bias)
        and not _needs_grad(weight, token_weights, num_items_in_batch)
    ):
        loss, _, _ = _call(
            _cce_kernels.fused_loss, steps, rows_e, c, flat, bias, class_coef, z_loss * coef, **head
        )
        if return_stats:
            return LinearCrossEntropyOutput(loss=loss, stats=FilterStats(None))
        return loss

    smoothing = None
    if label_smoothing:
        smoothing = coef.new_ones(c.shape[0]) if weight is None else weight.to(coef.dtype)
    r = cce_rows(
        rows_e,
        c,
        flat,
        bias,
        class_weight=smoothing,
        filter_eps=filter_eps,
        impl=impl,
        state=state,
        want_entropy=return_entropy,
        want_argmax=return_argmax,
        label_offset=steps,
        **head,
    )
    loss = class_coef * r.nll
    if smoothing is not None:
        spread = smoothing.sum() * r.lse - r.weighted_logit_sum
        loss = (1 - label_smoothing) * loss + label_smoothing / c.shape[0] * coef * spread
    if z_loss:
        loss = loss + z_loss * coef * r.lse**2
    loss = _per_token(loss, shape, steps) if reduction == "none" else loss.sum()
    if not returns:
        return loss
    argmax = accuracy = None
    if return_argmax:
        argmax = _per_token(r.argmax, shape, steps)
        accuracy = ((r.argmax == flat) & valid).sum() / valid.sum().clamp(min=1)
    return LinearCrossEntropyOutput(
        loss=loss,
        lse=_per_token(r.lse, shape, steps) if return_lse else None,
        entropy=_per_token(r.lse - r.mean_logit, shape, steps) if return_entropy else None,
        argmax=argmax,
        accuracy=accuracy,
        stats=FilterStats(r.stats) if return_stats else None,
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
    steps = inputs.resolve_shift(shift, targets)
    labels = inputs.shift_left(targets, steps, ignore_index)
    r = cce_rows(
        e.reshape(-1, e.shape[-1]),
        c,
        labels.reshape(-1),
        bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        ignore_index=ignore_index,
        filter_eps=filter_eps,
        impl=impl,
        state=state,
        want_entropy=True,
        label_offset=steps,
    )
    entropy = _per_token(r.lse - r.mean_logit, labels.shape, steps)
    return _per_token(-r.nll, labels.shape, steps), entropy


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


def _needs_grad(*tensors: object) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in tensors
    )


def _per_token(values: Tensor, shape: torch.Size, steps: int) -> Tensor:
    """[N] values in the shape of the targets, without the `steps` positions lost to the shift."""
    values = values.reshape(shape)
    return values[..., :-steps] if steps else values


def _coefficients(
    e: Tensor,
    labels: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    token_weights: Tensor | None,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """[N] token weights t_n and t_n * weight[label_n], both 0 in ignored rows."""
    coef = valid.to(torch.float64 if e.dtype == torch.float64 else torch.float32)
    if token_weights is not None:
        shifted = inputs.shift_left(token_weights, steps, 0).reshape(-1).to(coef.dtype)
        coef = torch.where(valid, shifted, torch.zeros_like(shifted))
    if weight is None:
        return coef, coef
    # clamped: a label out of range is reported by the op itself
    index = labels.clamp(0, weight.shape[0] - 1).long()
    return coef, coef * weight.to(coef.dtype)[index]


def _reciprocal(items: int | Tensor, like: Tensor) -> float | Tensor:
    """1 / items, and 1 for no items at all, so that an empty batch has loss 0."""
    if not isinstance(items, Tensor):
        return 1.0 / (items or 1)
    items = items.to(like.device, like.dtype).reshape(())
    return 1.0 / torch.where(items == 0, torch.ones_like(items), items)
