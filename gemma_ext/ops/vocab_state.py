"""Vocabulary order and profile that a training loop carries between loss calls.

The filter drops strips of 256 columns. Columns that many rows need are best side by side, so the
vocabulary is visited by falling kept count; what is dropped is returned in proportion to each
column's mean probability inside its tile. Both are estimates that change speed and the size of the
filter's error, nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SAMPLE_ROWS = 256


class VocabState(nn.Module):
    """Running column statistics of one LM head.

    Args:
        vocab_size: V.
        refresh_every: calls between two looks at a sample of rows (one look costs about
            256 / N of a forward).
        decay: weight of the past in the running averages.
        eps: probability above which a row counts as needing a column.

    Attributes:
        order: [V] int64, vocabulary id at each visited position.
        count, prob: [V] float32 running means over rows: share of rows that need the column, and
            its probability.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        refresh_every: int = 16,
        decay: float = 0.5,
        eps: float = 2.0**-12,
    ) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"expected vocab_size to be positive, got {vocab_size}")
        self.refresh_every, self.decay, self.eps = refresh_every, decay, eps
        self.calls = 0
        self.register_buffer("order", torch.arange(vocab_size))
        self.register_buffer("count", torch.zeros(vocab_size))
        self.register_buffer("prob", torch.zeros(vocab_size))

    @torch.no_grad()
    def observe(
        self,
        e: Tensor,
        c: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        lse: Tensor,
        head: tuple[float, float, float, int],
    ) -> None:
        """Refresh from e [N, D] on every `refresh_every`-th call; the next call uses the result.

        The buffers are replaced, never written into: a backward in flight keeps the order of its
        own forward.
        """
        due = self.calls % self.refresh_every == 0
        self.calls += 1
        if not due:
            return
        count, prob = torch.ops.gemma_ext.cce_column_stats(
            e, c, targets, bias, lse.detach(), *head, self.eps, _SAMPLE_ROWS
        )
        total = prob.sum()
        if not total > 0:
            return
        keep = self.decay if self.count.any() else 0.0
        self.count = keep * self.count + (1 - keep) * count / total
        self.prob = keep * self.prob + (1 - keep) * prob / total
        # the count ties for all columns nobody needs: their probability orders those
        self.order = torch.argsort(self.count + 1e-3 * self.prob, descending=True, stable=True)
