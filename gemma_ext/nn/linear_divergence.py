"""Distillation of one language model into another, without the logits of either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.nn._defer_head import defer_head
from gemma_ext.nn._deferred_logits import OF_THE_HEAD, DeferredLogits, LossOptions
from gemma_ext.nn._models import output_head, unwrap
from gemma_ext.ops.cce.divergence import LinearDivergenceOutput, linear_divergence


def distillation_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    **options: Any,
) -> Tensor | LinearDivergenceOutput:
    """Divergence of a student from a teacher, and cross-entropy, over the labels of a batch.

    Both models run their own forward up to the head, which is deferred: scales, soft-caps, biases
    and adapters of a head are the models' own. The teacher runs without gradient, in the mode
    (training or evaluation) that it is in.

    Args:
        student, teacher: causal language models of transformers, also wrapped.
        batch: what both forwards take, with `labels` [B, T] that are shifted here and of which -100
            takes no part.
        vocab_size: cut both heads to this many first rows, for heads padded differently.
        options: `kind`, `beta`, `ce_weight`, `temperature`, `token_weights`, `reduction`,
            `num_items_in_batch`, `return_parts`, `filter_eps`, `filter_seed` and `impl` of
            `gemma_ext.linear_divergence`.

    Returns:
        What `gemma_ext.linear_divergence` returns.

    Raises:
        ValueError: no labels in the batch, or heads of two vocabularies.
        TypeError, DeferredLogitsError: a model without a head that can be deferred.

    Example:
        >>> class DistillationTrainer(Trainer):
        ...     def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        ...         return distillation_loss(model, self.teacher, inputs, ce_weight=0.5)
    """
    batch = dict(batch)
    labels = batch.pop("labels", None)
    if labels is None:
        raise ValueError("expected labels in the batch, got none")
    mine = _described(student, batch, vocab_size)
    with torch.no_grad():
        theirs = _described(teacher, batch, vocab_size)
    device = mine["e"].device
    given = {f"teacher_{name}": _at(value, device) for name, value in theirs.items()}
    with torch.autocast(device.type, enabled=False):
        return linear_divergence(**mine, **given, targets=labels.to(device), shift=True, **options)


def _described(model: nn.Module, batch: dict[str, Any], vocab_size: int | None) -> dict[str, Any]:
    """Arguments of `linear_divergence` that stand for the logits of `model`."""
    inner = unwrap(model)
    options = LossOptions(type(inner).__name__, remedy="distil from materialised logits")
    with defer_head(output_head(inner), options):
        output = model(**{"use_cache": False, **batch})
    logits = output if isinstance(output, DeferredLogits) else getattr(output, "logits", None)
    if not isinstance(logits, DeferredLogits):
        raise TypeError(f"expected {options.owner} to return the logits of its head")
    if vocab_size is not None:
        logits = logits[..., :vocab_size]
    head = logits.head()
    return {name: head[name] for name in OF_THE_HEAD}


def _at(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
