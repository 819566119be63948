"""Prompts with their responses, and where in them the response's tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """B prompts, left-padded to P tokens, each with a response of up to T tokens behind column P.

    Of the B x T places of responses, N are tokens of the policy: those up to and including the
    first end of a response. Per-token quantities are packed, [N] in row-major order.

    Attributes:
        ids: [B, P + T] int64.
        mask: [B, P + T] int64 or bool, 1 where there is a token.
        response_mask: [B, T] bool.

    Raises:
        ValueError: shapes that do not fit.
    """

    ids: Tensor
    mask: Tensor
    response_mask: Tensor

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.mask.shape != self.ids.shape:
            raise ValueError(
                f"expected ids and mask to be [B, P + T], got {list(self.ids.shape)} and "
                f"{list(self.mask.shape)}"
            )
        rows, width = self.ids.shape
        shape = self.response_mask.shape
        if len(shape) != 2 or shape[0] != rows or not shape[1] < width:
            raise ValueError(
                f"expected response_mask to be [{rows}, T] with T < {width}, got {list(shape)}"
            )
        if self.response_mask.dtype != torch.bool:
            raise ValueError(f"expected a bool response_mask, got {self.response_mask.dtype}")

    @classmethod
    def build(
        cls,
        prompts: Tensor,
        prompt_mask: Tensor,
        responses: Tensor,
        ends: Sequence[int],
        *,
        pad: int = 0,
    ) -> Sequences:
        """Sequences of generated responses.

        Args:
            prompts: [B, P], left-padded; prompt_mask: [B, P].
            responses: [B, T]; whatever is behind the first end becomes padding.
            ends: token ids that end a response.
            pad: token id of padding.
        """
        ended = torch.isin(responses, torch.tensor(list(ends), device=responses.device).long())
        before = ended.cumsum(1) - ended.long()
        return cls.of_lengths(prompts, prompt_mask, responses, (before == 0).sum(1), pad=pad)

    @classmethod
    def of_lengths(
        cls,
        prompts: Tensor,
        prompt_mask: Tensor,
        responses: Tensor,
        lengths: Tensor,
        *,
        pad: int = 0,
    ) -> Sequences:
        """Sequences whose responses [B, T] have `lengths` [B] tokens.

        Raises:
            ValueError: prompts that are not padded on the left.
        """
        if not bool(prompt_mask[:, -1].all()):
            raise ValueError("expected prompts padded on the left, got padding before a response")
        steps = torch.arange(responses.shape[1], device=responses.device)
        real = steps < lengths.to(responses.device).unsqueeze(1)
        ids = torch.cat([prompts, responses.masked_fill(~real, pad)], 1)
        return cls(ids, torch.cat([prompt_mask.to(real.device).long(), real.long()], 1), real)

    @classmethod
    def cat(cls, parts: Sequence[Sequences], *, pad: int = 0) -> Sequences:
        """The rows of all parts, padded to the longest prompt and the longest response."""
        prompt = max(part.prompt_width for part in parts)
        response = max(part.response_mask.shape[1] for part in parts)

        def widened(part: Sequences) -> tuple[Tensor, Tensor, Tensor]:
            left = prompt - part.prompt_width
            right = response - part.response_mask.shape[1]
            return (
                F.pad(part.ids, (left, right), value=pad),
                F.pad(part.mask, (left, right)),
                F.pad(part.response_mask, (0, right)),
            )

        return cls(*(torch.cat(columns) for columns in zip(*map(widened, parts), strict=True)))

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Sequences:
        """Some rows, at the same width."""
        return Sequences(self.ids[rows], self.mask[rows], self.response_mask[rows])

    @property
    def prompt_width(self) -> int:
        """P."""
        return self.ids.shape[1] - self.response_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        """[B, T] token ids, padding behind the end."""
        return self.ids[:, self.prompt_width :]

    @property
    def targets(self) -> Tensor:
        """[N] token ids of the responses."""
        return self.responses[self.response_mask]

    @property
    def lengths(self) -> Tensor:
        """[B] tokens of each response."""
        return self.response_mask.sum(1)

    @property
    def owners(self) -> Tensor:
        """[N] row of each response token."""
        return self.response_mask.nonzero()[:, 0]

    @property
    def position_ids(self) -> Tensor:
        """[B, P + T] places of the tokens without padding, as generation counts them."""
        return (self.mask.long().cumsum(1) - 1).clamp(min=0)

    def trimmed(self) -> Sequences:
        """The same without columns that are padding in every row."""
        used = self.mask.bool().any(0)
        left = int(used[: self.prompt_width].long().argmax())
        right = max(1, int(self.lengths.max())) if len(self) else 1
        end = self.prompt_width + right
        return Sequences(
            self.ids[:, left:end], self.mask[:, left:end], self.response_mask[:, :right]
        )

    def hidden_rows(self, hidden: Tensor) -> Tensor:
        """[N, D] of hidden [B, P + T, D]: the states that predict the response's tokens.

        The state at P - 1 + t predicts, and is valued before, token t. Anything that takes a mask
        [B, P + T] and one of [B, T] as index works, such as deferred logits.
        """
        return hidden[self._before()]

    def last(self) -> Tensor:
        """[B, P + T] bool, true at the last token of each row."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        return places == (self.prompt_width - 1 + self.lengths).unsqueeze(1)

    def pack(self, values: Tensor) -> Tensor:
        """[N, ...] of [B, T, ...]."""
        return values[self.response_mask]

    def unpack(self, values: Tensor, fill: float = 0) -> Tensor:
        """[B, T] of packed [N], `fill` behind the ends."""
        out = values.new_full(self.response_mask.shape, fill)
        return out.masked_scatter(self.response_mask, values)

    def to(self, device: torch.device | str) -> Sequences:
        return Sequences(self.ids.to(device), self.mask.to(device), self.response_mask.to(device))

    def _before(self) -> Tensor:
        """[B, P + T] bool, true one column before each response token."""
        return F.pad(self.response_mask, (self.prompt_width - 1, 1))
