"""What rewards are given for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gemma_ext.nn.ppo import Sequences
from gemma_ext.ppo.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Responses:
    """Answers to prompts, and what reward functions say beside their rewards.

    Attributes:
        prompts: texts or messages; completions: alike; completion_ids: tokens, the end included.
        columns: of the dataset, a list for each.
        sequences: the same as tensors.
        state: `global_step` and `max_steps` of the run.
        metrics: what `log_metric` was told. extra: columns that `log_extra` was told.
    """

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: Mapping[str, list[Any]]
    sequences: Sequences
    state: Any = None
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        prompts: Prompts,
        rows: Sequence[int],
        sequences: Sequences,
        tokenizer: PreTrainedTokenizerBase,
        state: Any = None,
    ) -> Responses:
        """To some rows of a dataset; the completion of messages is a message."""
        ids = [
            row[real].tolist()
            for row, real in zip(sequences.responses, sequences.response_mask, strict=True)
        ]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        given = [prompts.given(row) for row in rows]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(given, texts, strict=True)
        ]
        return cls(given, completions, ids, prompts.columns(rows), sequences, state)

    def told(self, row: int) -> dict[str, Any]:
        """What `log_extra` has of a response, as JSON has it."""
        return {name: _plain(values[row]) for name, values in self.extra.items()}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
