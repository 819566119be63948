"""From labels to token weights, and from the rows of a head to its loss, in plain torch.

Shared by the plain and the vocabulary-parallel loss, which differ in where their rows come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ext.ops.cce.head import Head
from gemma_ext.ops.cce.inputs import check_number, check_tensor, check_vector

REDUCTIONS = ("mean", "sum", "none")


class Rows(NamedTuple):
    """Per-row quantities of an LM head; zero (argmax: -1) in ignored rows.

    Attributes:
        nll: [N] negative log-likelihood of the target; equals lse where a row has no target.
        lse: [N] log sum_v exp(s_nv).
        mean_logit: [N] sum_v p_nv s_nv, or None when the entropy was not asked for.
        weighted_logit_sum: [N] sum_v class_weight_v s_nv, or None without class weights.
        argmax: [N] int64 argmax_v s_nv (ties: lowest index), or None when not asked for.
        stats: [3] float64, the values of `FilterStats`; None where nothing is ever left out.
        log_sum_sq_probs: [N] log sum_v p_nv^2, without gradient, or None when not asked for.
        average_logit: [N] sum_v s_nv / V, without gradient; None as log_sum_sq_probs is.
    """

    nll: Tensor
    lse: Tensor
    mean_logit: Tensor | None = None
    weighted_logit_sum: Tensor | None = None
    argmax: Tensor | None = None
    stats: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    average_logit: Tensor | None = None

    def entropy(self) -> Tensor:
        """[N], of rows that were asked for their mean logit."""
        entropy = self.lse - self.mean_logit
        # two roundings of a logit may leave less than nothing of a row that is certain
        return entropy + (entropy.clamp(min=0.0) - entropy).detach()

    def is_top1(self, labels: Tensor) -> Tensor:
        """[N] bool, whether the label [N] is the argmax that was asked for."""
        return self.argmax == labels


class FilterStats(NamedTuple):
    """What the sampled backward keeps of rows that all weigh the same, and at what error.

    Computed by the forward, which knows no upstream gradients: token weights, class weights or a
    loss per token that is weighed later keep other strips.

    Attributes:
        values: [3] float64, the properties in order, on the device of e, for which reading a
            property waits; None where nothing is ever left out.
    """

    values: Tensor | None

    def _at(self, index: int, exact: float) -> float:
        return exact if self.values is None else float(self.values[index])

    @property
    def kept_fraction(self) -> float:
        """Strips (one row, 256 columns) that are computed, expected share of valid rows' strips."""
        return self._at(0, 1.0)

    @property
    def relative_error(self) -> float:
        """Predicted relative standard error of the gradient of e; it has no bias."""
        return self._at(1, 0.0)

    @property
    def eps(self) -> float:
        """Threshold in use, 0 where the backward is exact."""
        return self._at(2, 0.0)


class LinearCrossEntropyOutput(NamedTuple):
    """What `linear_cross_entropy` returns when a `return_*` flag is set; None where not asked.

    Attributes:
        loss: 0-d, or [..., max(T - shift, 0)] with reduction "none"; float32.
        lse: [..., T - shift] differentiable log-sum-exp, 0 at ignored positions.
        entropy: [..., T - shift] differentiable entropy in nats, 0 at ignored positions.
        argmax: [..., T - shift] int64 most probable id, -1 at ignored positions.
        accuracy: 0-d fraction of the positions not ignored whose argmax is the target.
        stats: what the sampled backward keeps.
    """

    loss: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    accuracy: Tensor | None = None
    stats: FilterStats | None = None


@dataclass(frozen=True, eq=False)
class LossTerms:
    """What is made of the rows of a head, with the meaning of `linear_cross_entropy`'s arguments.

    Raises:
        TypeError, ValueError: a value that no call could take.
    """

    reduction: str = "mean"
    shift: int | bool = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    weight: Tensor | None = None
    token_weights: Tensor | None = None
    num_items_in_batch: int | Tensor | None = None

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(
                f"expected reduction to be one of {', '.join(REDUCTIONS)}, got {self.reduction!r}"
            )
        if not isinstance(self.shift, int):
            got = type(self.shift).__name__
            raise TypeError(f"expected shift to be an int or bool, got {got}")
        if self.shift < 0:
            raise ValueError(f"expected shift to be 0 or more, got {self.shift}")
        check_number("label_smoothing", self.label_smoothing)
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"expected label_smoothing in [0, 1], got {self.label_smoothing}")
        check_number("z_loss", self.z_loss)
        for name in ("weight", "token_weights"):
            if getattr(self, name) is not None:
                check_tensor(name, getattr(self, name))
        self._check_items()

    def _check_items(self) -> None:
        items = self.num_items_in_batch
        if items is None:
            return
        if self.reduction != "mean":
            raise ValueError(
                f"expected reduction 'mean' with num_items_in_batch, got {self.reduction!r}"
            )
        if isinstance(items, Tensor):
            if items.numel() != 1:
                raise ValueError(
                    f"expected num_items_in_batch to hold one number, got {list(items.shape)}"
                )
            return
        check_number("num_items_in_batch", items, "a number or a tensor")
        if items < 0:
            raise ValueError(f"expected num_items_in_batch to be 0 or more, got {items}")

    def check(self, targets: Tensor, vocab_size: int) -> None:
        """Raise TypeError or ValueError unless the tensors fit targets [..., T] and V."""
        check_vector("weight", self.weight, vocab_size, targets.device)
        if self.shift and targets.dim() < 1:
            raise ValueError("expected targets to be [..., T] with shift, got a 0-d tensor")
        t = self.token_weights
        if t is None:
            return
        if t.device != targets.device:
            raise ValueError(f"expected token_weights on {targets.device} like e, got {t.device}")
        if t.shape != targets.shape:
            raise ValueError(
                f"expected token_weights to be {list(targets.shape)}, got {list(t.shape)}"
            )

    def smoothing(self, vocab_size: int, like: Tensor) -> Tensor | None:
        """[V] class weights of the smoothed part of the loss; None without label smoothing."""
        if not self.label_smoothing:
            return None
        return like.new_ones(vocab_size) if self.weight is None else self.weight.to(like.dtype)


class Wanted(NamedTuple):
    """What is returned beside the loss."""

    lse: bool = False
    entropy: bool = False
    argmax: bool = False
    stats: bool = False


class Tokens(NamedTuple):
    """The scored positions of one call.

    Attributes:
        shape: of the targets; steps: positions lost to the shift.
        labels: [N], shifted and flat; valid: [N] labels that are not ignored.
        coef: [N] weight t_n of a row; class_coef: [N] t_n * weight[label_n]. 0 in ignored rows; the
            divisor of the mean is inside both.
    """

    shape: torch.Size
    steps: int
    labels: Tensor
    valid: Tensor
    coef: Tensor
    class_coef: Tensor

    def unflatten(self, values: Tensor) -> Tensor:
        """[N] values in the shape of the targets, without the positions lost to the shift."""
        values = values.reshape(self.shape)
        return values[..., : -self.steps] if self.steps else values


def weigh(e: Tensor, targets: Tensor, head: Head, terms: LossTerms) -> Tokens:
    """Labels and weights of targets [..., T] for hidden states e [..., T, D]."""
    # a sequence of no more than `steps` positions has none that is scored
    steps = int(terms.shift)
    shifted = _shift_left(targets, steps, head.ignore_index)
    labels = shifted.reshape(-1)
    valid = labels != head.ignore_index
    coef = valid.to(torch.float64 if e.dtype == torch.float64 else torch.float32)
    if terms.token_weights is not None:
        t = _shift_left(terms.token_weights, steps, 0).reshape(-1).to(coef.dtype)
        coef = torch.where(valid, t, torch.zeros_like(t))
    class_coef = coef
    if terms.weight is not None:
        # clamped: a label out of range that nobody looked at makes its loss NaN
        index = labels.clamp(0, terms.weight.shape[0] - 1).long()
        class_coef = coef * terms.weight.to(coef.dtype)[index]
    if terms.reduction == "mean":
        items = terms.num_items_in_batch
        scale = _reciprocal(class_coef.sum() if items is None else items, coef)
        coef, class_coef = coef * scale, class_coef * scale
    return Tokens(shifted.shape, steps, labels, valid, coef, class_coef)


def assemble(
    tokens: Tokens, rows: Rows, smoothing: Tensor | None, terms: LossTerms, wanted: Wanted
) -> Tensor | LinearCrossEntropyOutput:
    """The loss of the head of `gemma_ext.ops.cce`, and what was asked for beside it."""
    loss = tokens.class_coef * rows.nll
    if smoothing is not None:
        spread = smoothing.sum() * rows.lse - rows.weighted_logit_sum
        uniform = terms.label_smoothing / smoothing.shape[0]
        loss = (1 - terms.label_smoothing) * loss + uniform * tokens.coef * spread
    if terms.z_loss:
        loss = loss + terms.z_loss * tokens.coef * rows.lse**2
    loss = tokens.unflatten(loss) if terms.reduction == "none" else loss.sum()
    if not any(wanted):
        return loss
    argmax = accuracy = None
    if wanted.argmax:
        argmax = tokens.unflatten(rows.argmax)
        hits = (rows.argmax == tokens.labels) & tokens.valid
        accuracy = hits.sum() / tokens.valid.sum().clamp(min=1)
    return LinearCrossEntropyOutput(
        loss=loss,
        lse=tokens.unflatten(rows.lse) if wanted.lse else None,
        entropy=tokens.unflatten(rows.entropy()) if wanted.entropy else None,
        argmax=argmax,
        accuracy=accuracy,
        stats=FilterStats(rows.stats) if wanted.stats else None,
    )


def _shift_left(values: Tensor, steps: int, fill: float) -> Tensor:
    """values[..., t + steps] at t, `fill` in the last `steps` positions; e itself is not copied."""
    if steps == 0:
        return values
    tail = torch.full_like(values[..., :steps], fill)
    return torch.cat((values[..., steps:], tail), dim=-1)


def _reciprocal(items: int | Tensor, like: Tensor) -> float | Tensor:
    """1 / items, and 1 for no items at all, so that an empty batch has loss 0."""
    if not isinstance(items, Tensor):
        return 1.0 / (items or 1)
    # a number on the CPU stays there: torch hands it to the kernels of any device as an argument
    items = items.to("cpu" if items.is_cpu else like.device, like.dtype).reshape(())
    return 1.0 / torch.where(items == 0, torch.ones_like(items), items)
