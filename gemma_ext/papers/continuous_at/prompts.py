"""Prompts and their targets as tokens: a prompt is tokenised once, whatever follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.lm.protocol import Prompt
from gemma_ext.lm.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDINGS = ("right", "left")


@dataclass(frozen=True)
class Row:
    """A prompt and what is to follow it.

    Attributes:
        prompt: ids, with <bos> and the tokens of the chat template.
        target: ids of the continuation that is scored.
        free: (start, end) of the prompt's tokens that an attack may move; None for all.

    Raises:
        ValueError: an empty prompt or target, a range outside the prompt.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    free: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))
        object.__setattr__(self, "target", tuple(self.target))
        for name in ("prompt", "target"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one token, got none")
        if self.free is not None:
            start, end = self.free
            if not 0 <= start < end <= len(self.prompt):
                raise ValueError(
                    f"free: expected 0 <= start < end <= {len(self.prompt)}, got {self.free}"
                )

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)

    @property
    def moved(self) -> int:
        """How many tokens an attack may move."""
        start, end = self.free or (0, len(self.prompt))
        return end - start


class Encoder:
    """A tokenizer with its own chat template.

    Messages go through the template; a text does not. Targets are tokenised apart from the prompt,
    so that answers of one prompt share its tokens.

    Args:
        tokenizer: of `transformers`.
        max_length: of a row; a longer one loses the end of its target.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        self.text = Text(tokenizer, encoder_decoder=False)
        self.max_length = max_length

    def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids of a prompt, open for an answer."""
        return tuple(self.text.encode([prompt])[0])

    def ask(self, request: str) -> tuple[int, ...]:
        """Ids of a user's request under the chat template.

        Raises:
            ValueError: the tokenizer has no template.
        """
        return self.prompt([{"role": "user", "content": request}])

    def answer(self, answer: str, close: bool = False) -> tuple[int, ...]:
        """Ids of an answer.

        Args:
            close: end it with the tokenizer's <eos>.
        """
        ids = self.text.bare([answer])[0]
        return (*ids, self.text.tokenizer.eos_token_id) if close else tuple(ids)

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> Row:
        """A conversation whose last message, the assistant's, is the target.

        Raises:
            ValueError: it ends otherwise.
        """
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError("messages: expected some that end with the assistant's")
        return self.row(self.prompt(messages[:-1]), self.answer(messages[-1]["content"]))

    def row(
        self, prompt: tuple[int, ...], target: tuple[int, ...], free: tuple[int, int] | None = None
    ) -> Row:
        """The row of a prompt and a target, cut to `max_length`.

        Raises:
            ValueError: a prompt that leaves no room for a target.
        """
        if self.max_length is not None:
            room = self.max_length - len(prompt)
            if room < 1:
                raise ValueError(
                    f"prompt: expected fewer than max_length={self.max_length} tokens, "
                    f"got {len(prompt)}"
                )
            target = target[:room]
        return Row(prompt, target, free)


class Batch:
    """Rows side by side, padded to the longest of them.

    Attributes:
        rows: B of them.
        ids: [B, T] int64, 0 in padding.
        mask: [B, T] bool, True where a token is.
        free: [B, T] bool, tokens that may be moved.
        scored: [B, T] bool, tokens of targets.

    Args:
        rows: at least one.
        padding: "right" or "left".

    Raises:
        ValueError: no rows, or an unknown padding.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        device: torch.device | str = "cpu",
        padding: str = "right",
    ) -> None:
        if not rows:
            raise ValueError("rows: expected at least one, got none")
        if padding not in PADDINGS:
            raise ValueError(f"padding: expected right or left, got {padding!r}")
        self.rows, self.padding = tuple(rows), padding
        width = max(map(len, rows))
        shape = (len(rows), width)
        ids = torch.zeros(shape, dtype=torch.int64)
        mask, free, scored = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
        for at, row in enumerate(rows):
            start = width - len(row) if padding == "left" else 0
            middle, end = start + len(row.prompt), start + len(row)
            ids[at, start:end] = torch.tensor(row.prompt + row.target)
            mask[at, start:end] = True
            first, last = row.free or (0, len(row.prompt))
            free[at, start + first : start + last] = True
            scored[at, middle:end] = True
        self.ids, self.mask = ids.to(device), mask.to(device)
        self.free, self.scored = free.to(device), scored.to(device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @cached_property
    def positions(self) -> Tensor:
        """[B, T] int64: place of each token in its own row."""
        return (self.mask.cumsum(1) - 1).clamp_min(0)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """(row, column) [P] of the tokens that may be moved, row by row."""
        return self.free.nonzero(as_tuple=True)

    @cached_property
    def predictors(self) -> tuple[Tensor, Tensor]:
        """(row, column) [N] of the states that predict the targets, row by row."""
        row, column = self.scored.nonzero(as_tuple=True)
        return row, column - 1

    @cached_property
    def targets(self) -> Tensor:
        """[N] ids of the targets, row by row."""
        return self.ids[self.scored]

    def means(self, values: Tensor) -> Tensor:
        """[B] means of values [N] of targets, over each row's own."""
        row, _ = self.predictors
        sums = values.new_zeros(len(self)).index_add(0, row, values)
        return sums / self.scored.sum(1)

    def model_inputs(self) -> dict[str, Tensor]:
        """Mask and positions as a causal LM of transformers takes them."""
        return {"attention_mask": self.mask.long(), "position_ids": self.positions}
