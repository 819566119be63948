"""What a request has said so far, and what that and its bias do to the next logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gemma_ext.serve.protocol import SamplingParams


class History:
    """Tokens of every row of the block tables.

    Args:
        requests: rows.
        max_length: tokens of prompt and output at most.
        vocabulary: V.
    """

    def __init__(
        self, requests: int, max_length: int, vocabulary: int, device: torch.device
    ) -> None:
        self.vocabulary, self.device = vocabulary, device
        self.tokens = torch.zeros(requests, max_length + 1, dtype=torch.int64, device=device)
        self.params: list[SamplingParams | None] = [None] * requests
        self.start = np.zeros(requests, np.int64)  # position of the first drawn token
        self.min_tokens = np.zeros(requests, np.int64)  # 0 without stop ids
        self.weighs = np.zeros(requests, bool)  # bias or a penalty
        self.biases: list[tuple[Tensor, Tensor] | None] = [None] * requests  # ids, values
        self.stops: list[Tensor | None] = [None] * requests

    def open(
        self, row: int, prompt: Sequence[int], drawn: Sequence[int], params: SamplingParams
    ) -> None:
        """A request takes a row, with the tokens that an earlier stay has drawn."""
        tokens = torch.tensor([*prompt, *drawn])
        self.tokens[row, : len(tokens)].copy_(tokens, non_blocking=True)
        self.start[row] = len(prompt)
        self.params[row] = params
        self.min_tokens[row] = params.min_tokens if params.stop_ids else 0
        self.biases[row] = self.stops[row] = None
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            self.biases[row] = (
                torch.tensor(ids, device=self.device),
                torch.tensor(values, dtype=torch.float64, device=self.device),
            )
        if self.min_tokens[row]:
            self.stops[row] = torch.tensor(params.stop_ids, device=self.device)
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self.weighs[row] = bool(params.logit_bias) or penalties != (1.0, 0.0, 0.0)

    def add(self, rows: Tensor, positions: Tensor, ids: Tensor) -> None:
        """Tokens `ids` [n] were drawn behind `positions` [n]."""
        self.tokens[rows, positions + 1] = ids.to(self.tokens.dtype)

    def changes(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """bool [n]: whether the token behind `positions` is drawn from other logits."""
        return self.weighs[rows] | (positions + 1 - self.start[rows] < self.min_tokens[rows])

    def adjust(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits [n, V] with bias, stop ids that come too early, and penalties, in this order."""
        params = [self.params[row] for row in rows.tolist()]
        drawn = positions + 1 - torch.from_numpy(self.start)[rows]
        for z, row, done in zip(logits, rows.tolist(), drawn.tolist(), strict=True):
            if self.biases[row] is not None:
                ids, values = self.biases[row]
                z[ids] += values.to(z.dtype)
            if done < self.min_tokens[row]:
                z[self.stops[row]] = -torch.inf
        said, counts = self._counts(rows, positions)

        def column(name: str) -> Tensor:
            values = [[getattr(each, name)] for each in params]
            return torch.tensor(values, dtype=logits.dtype, device=logits.device)

        factor = column("repetition_penalty")
        penalised = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(said, penalised, logits)
        once = column("presence_penalty") * (counts > 0)
        return logits - once - column("frequency_penalty") * counts

    def _counts(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(bool [n, V] said or given, int32 [n, V] how often drawn), up to `positions`."""
        length = int(positions.max()) + 1
        at = torch.arange(length)
        tokens = self.tokens[rows.to(self.device), :length]
        last = positions.unsqueeze(-1)
        starts = torch.from_numpy(self.start)[rows].unsqueeze(-1)
        found = []
        for mask in (at <= last, (at >= starts) & (at <= last)):
            counts = torch.zeros(len(rows), self.vocabulary, dtype=torch.int32, device=self.device)
            found.append(counts.scatter_add_(1, tokens, mask.int().to(self.device)))
        return found[0] > 0, found[1]
