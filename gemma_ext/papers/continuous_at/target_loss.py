"""Negative log-likelihood of targets, from the rows of hidden states that predict them.

The model's own forward runs with its head deferred (`gemma_ext.nn._defer_head`), so its soft-cap,
scale and bias are in the loss, and of [B, T, V] logits none are held: the head is read by
`gemma_ext.ops.cce.cce_rows` at the N positions before targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_ext.nn._defer_head import defer_head
from gemma_ext.nn._deferred_logits import DeferredLogits, LossOptions
from gemma_ext.nn._models import output_head
from gemma_ext.ops.cce import Rows, cce_rows
from gemma_ext.papers.continuous_at.prompts import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REMEDY = "its targets cannot be scored without holding its logits"


class TargetLoss:
    """-log p(target token | what is before it), of every target of a batch.

    Args:
        model: causal LM of transformers, or of peft around one.
        impl: as in `gemma_ext.linear_logprobs`; gradients are exact in every dtype.

    Raises:
        TypeError: the model has no head.
    """

    def __init__(self, model: PreTrainedModel, impl: str = "auto") -> None:
        self.model = model
        self._head = output_head(model)
        self._options = LossOptions(
            type(model).__name__, impl=impl, filter_eps=None, remedy=_REMEDY
        )

    def __call__(self, batch: Batch, embeddings: Tensor | None = None) -> Tensor:
        """Float32 [N] (float64 of a float64 model), row by row, differentiable.

        Args:
            embeddings: [B, T, D] in place of those of `batch.ids`.

        Raises:
            TypeError: the model's logits are not a product with its head.
        """
        return self._rows(batch, embeddings).nll

    @torch.no_grad()
    def greedy(self, batch: Batch, embeddings: Tensor | None = None) -> Tensor:
        """[B] bool: rows whose target is what the likeliest tokens write."""
        rows = self._rows(batch, embeddings, want_argmax=True)
        return batch.means((rows.argmax == batch.targets).double()) == 1

    def means(self, batch: Batch, embeddings: Tensor | None = None) -> Tensor:
        """[B]: means over the tokens of each row's target."""
        return batch.means(self(batch, embeddings))

    def _rows(self, batch: Batch, embeddings: Tensor | None, want_argmax: bool = False) -> Rows:
        inputs: dict[str, Any] = batch.model_inputs() | {"use_cache": False, "return_dict": True}
        if embeddings is None:
            inputs["input_ids"] = batch.ids
        else:
            inputs["inputs_embeds"] = embeddings
        with defer_head(self._head, self._options):
            logits = self.model(**inputs).logits
        if not isinstance(logits, DeferredLogits):
            owner = self._options.owner
            raise TypeError(f"expected {owner} to return the logits of its head; {_REMEDY}")
        logits = logits[batch.predictors]
        with logits.autocast_of_the_head():
            return cce_rows(**logits.head(), targets=batch.targets, want_argmax=want_argmax)
