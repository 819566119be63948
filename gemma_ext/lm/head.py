"""Log-probabilities read off a model whose head is never multiplied out.

The model's own forward runs under `gemma_ext.nn._defer_head`, so that soft-caps, scales and biases
are the model's; of its [B, T, V] logits, only rows of hidden states are kept, and `cce_rows` scores
those that predict a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.lm.plan import Row
from gemma_ext.lm.protocol import Score
from gemma_ext.nn._defer_head import defer_head
from gemma_ext.nn._deferred_logits import DeferredLogits, LossOptions
from gemma_ext.ops.cce import cce_rows

_REMEDY = "it cannot be scored without holding its logits"


class Scored:
    """A model whose forward returns `DeferredLogits`.

    Args:
        model: of `transformers`, with a head into the vocabulary.
        impl: as in `gemma_ext.linear_logprobs`.

    Raises:
        TypeError: the model has no such head.
    """

    def __init__(self, model: nn.Module, impl: str) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise TypeError(f"expected {type(model).__name__} to have output embeddings, got None")
        self.model = model
        self._head = head
        self._options = LossOptions(
            type(model).__name__, impl=impl, filter_eps=None, remedy=_REMEDY
        )

    def __call__(self, **inputs: Any) -> Any:
        """The model's output.

        Raises:
            TypeError, DeferredLogitsError: the model makes its logits in another way than by a
                product with its head.
        """
        with defer_head(self._head, self._options):
            output = self.model(**inputs, return_dict=True)
        if not isinstance(output.logits, DeferredLogits):
            owner = self._options.owner
            raise TypeError(f"expected {owner} to return the logits of its head; {_REMEDY}")
        ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        if output.logits.shape[1] != ids.shape[1]:
            raise TypeError(
                f"expected {self._options.owner} to return logits for {ids.shape[1]} inputs, got "
                f"{output.logits.shape[1]}; a model with a tuned prompt cannot be scored"
            )
        return output


def read(logits: DeferredLogits, rows: Sequence[Row]) -> list[tuple[int, Score]]:
    """The scores of all marks of a batch whose logits are [len(rows), T, V], with their jobs."""
    marks = [(place, mark) for place, row in enumerate(rows) for mark in row.marks]
    at = [(place, mark.start + i) for place, mark in marks for i in range(len(mark.targets))]
    targets = [target for _, mark in marks for target in mark.targets]
    places, steps = torch.tensor(at, device=logits.device).unbind(1)
    logprobs, greedy = _score(logits[places, steps], torch.tensor(targets, device=logits.device))
    found, start = [], 0
    for _, mark in marks:
        end = start + len(mark.targets)
        found.append((mark.job, Score(tuple(logprobs[start:end]), all(greedy[start:end]))))
        start = end
    return found


def _score(logits: DeferredLogits, targets: Tensor) -> tuple[list[float], list[bool]]:
    with logits.autocast_of_the_head():
        rows = cce_rows(**logits.head(), targets=targets, want_argmax=True)
    return (-rows.nll).tolist(), (rows.argmax == targets).tolist()
