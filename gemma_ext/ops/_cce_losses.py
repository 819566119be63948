"""From labels to token weights, and from the rows of a head to its loss, in plain torch.

Shared by the plain and the vocabulary-parallel loss, which differ in where their rows come from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ext.ops import _cce_inputs as inputs
from gemma_ext.reference.cce import Rows


class FilterStats(NamedTuple):
    """What the gradient filter keeps of a backward that weighs all rows the same.

    Computed by the forward, which knows no upstream gradients: token weights, class weights or a
    loss per token that is weighed later keep other strips.

    Attributes:
        values: [4] float64, the four properties in order, on the device of e, for which reading a
            property waits; None where nothing is ever filtered.
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


def weigh_tokens(
    e: Tensor,
    targets: Tensor,
    *,
    shift: int | bool,
    ignore_index: int,
    reduction: str,
    weight: Tensor | None,
    token_weights: Tensor | None,
    num_items_in_batch: int | Tensor | None,
) -> Tokens:
    """Labels and weights of targets [..., T] for hidden states e [..., T, D]."""
    steps = inputs.resolve_shift(shift, targets)
    shifted = inputs.shift_left(targets, steps, ignore_index)
    labels = shifted.reshape(-1)
    valid = labels != ignore_index
    coef = valid.to(torch.float64 if e.dtype == torch.float64 else torch.float32)
    if token_weights is not None:
        t = inputs.shift_left(token_weights, steps, 0).reshape(-1).to(coef.dtype)
        coef = torch.where(valid, t, torch.zeros_like(t))
    class_coef = coef
    if weight is not None:
        # clamped: a label out of range is reported by the op itself
        index = labels.clamp(0, weight.shape[0] - 1).long()
        class_coef = coef * weight.to(coef.dtype)[index]
    if reduction == "mean":
        items = class_coef.sum() if num_items_in_batch is None else num_items_in_batch
        scale = _reciprocal(items, coef)
        coef, class_coef = coef * scale, class_coef * scale
    return Tokens(shifted.shape, steps, labels, valid, coef, class_coef)


def smoothing_weights(
    tokens: Tokens, vocab_size: int, weight: Tensor | None, label_smoothing: float
) -> Tensor | None:
    """[V] class weights of the smoothed part of the loss; None without label smoothing."""
    if not label_smoothing:
        return None
    return tokens.coef.new_ones(vocab_size) if weight is None else weight.to(tokens.coef.dtype)


def assemble(
    tokens: Tokens,
    rows: Rows,
    smoothing: Tensor | None,
    *,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    return_lse: bool,
    return_entropy: bool,
    return_argmax: bool,
    return_stats: bool,
) -> Tensor | LinearCrossEntropyOutput:
    """The loss of the head of `gemma_ext.ops.cce`, and what was asked for beside it."""
    loss = tokens.class_coef * rows.nll
    if smoothing is not None:
        spread = smoothing.sum() * rows.lse - rows.weighted_logit_sum
        uniform = label_smoothing / smoothing.shape[0]
        loss = (1 - label_smoothing) * loss + uniform * tokens.coef * spread
    if z_loss:
        loss = loss + z_loss * tokens.coef * rows.lse**2
    loss = tokens.unflatten(loss) if reduction == "none" else loss.sum()
    if not (return_lse or return_entropy or return_argmax or return_stats):
        return loss
    argmax = accuracy = None
    if return_argmax:
        argmax = tokens.unflatten(rows.argmax)
        hits = (rows.argmax == tokens.labels) & tokens.valid
        accuracy = hits.sum() / tokens.valid.sum().clamp(min=1)
    return LinearCrossEntropyOutput(
        loss=loss,
        lse=tokens.unflatten(rows.lse) if return_lse else None,
        entropy=tokens.unflatten(rows.lse - rows.mean_logit) if return_entropy else None,
        argmax=argmax,
        accuracy=accuracy,
        stats=FilterStats(rows.stats) if return_stats else None,
    )


def _reciprocal(items: int | Tensor, like: Tensor) -> float | Tensor:
    """1 / items, and 1 for no items at all, so that an empty batch has loss 0."""
    if not isinstance(items, Tensor):
        return 1.0 / (items or 1)
    # a number on the CPU stays there: torch hands it to the kernels of any device as an argument
    items = items.to("cpu" if items.is_cpu else like.device, like.dtype).reshape(())
    return 1.0 / torch.where(items == 0, torch.ones_like(items), items)
