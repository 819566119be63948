"""Vocabulary order and profile that a training loop carries between loss calls.

The filter drops strips of 256 columns. Columns that many rows need are best side by side, so the
vocabulary is visited by falling kept count; what is dropped is returned in proportion to each
column's mean probability inside its tile. Both are estimates that change speed and the size of the
filter's error, nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma_ext.ops import _devices

_SAMPLE_ROWS = 256


class VocabState(nn.Module):
    """Running column statistics of one LM head.

    Args:
        vocab_size: V.
        refresh_every: calls between two looks at a sample of rows (one look costs about
            256 / N of a forward).
        decay: weight of the past in the running averages.
        eps: probability above which a row counts as needing a column.
        device: of the buffers, that of the hidden states.

    Attributes:
        order: [V] int64, vocabulary id at each visited position.
        count, prob: [V] float32 running means over rows: share of rows that need the column, and
            its probability.
        steps: 0-d int64, calls seen.
        flat: 0-d bool, whether "auto" found too little to drop when it last looked; until the next
            refresh its calls on the CPU go straight to the exact form, three matrix products
            instead of four.

    On CUDA no value is looked at by the host: every call enqueues the same kernels, refresh or not,
    and may be captured into a graph.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        refresh_every: int = 16,
        decay: float = 0.5,
        eps: float = 2.0**-12,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"expected vocab_size to be positive, got {vocab_size}")
        self.refresh_every, self.decay, self.eps = refresh_every, decay, eps
        self.register_buffer("order", torch.arange(vocab_size, device=device))
        self.register_buffer("count", torch.zeros(vocab_size, device=device))
        self.register_buffer("prob", torch.zeros(vocab_size, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("flat", torch.zeros((), dtype=torch.bool, device=device))

    def skip(self) -> bool:
        """Whether this call may go straight to the exact form; it then counts as seen.

        Never on CUDA: the host would have to wait for the answer.
        """
        if not _devices.is_readable(self.flat) or not self.flat:
            return False
        if int(self.steps) % self.refresh_every == 0:
            return False
        self.steps += 1
        return True

    def observe(
        self,
        e: Tensor,
        c: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        lse: Tensor,
        eps: Tensor,
        head: dict[str, float | int],
    ) -> None:
        """Refresh from e [N, D] on every `refresh_every`-th call; the next call uses the result.

        Writes into the buffers: a forward hands copies of them to its backward. `eps` is the
        threshold that the filter took, 0-d, 0 where it gave way to the exact form.
        """
        bias = None if bias is None else bias.detach()
        buffers = (self.order, self.count, self.prob, self.steps, self.flat)
        _observe(
            *buffers,
            e.detach(),
            c.detach(),
            targets,
            bias,
            lse.detach(),
            eps,
            **head,
            eps=self.eps,
            refresh_every=self.refresh_every,
            decay=self.decay,
        )


# An op of its own, so that a traced graph keeps the counting and the branches out of sight.
@torch.library.custom_op(
    "gemma_ext::vocab_state_observe", mutates_args=("order", "count", "prob", "steps", "flat")
)
def _observe(
    order: Tensor,
    count: Tensor,
    prob: Tensor,
    steps: Tensor,
    flat: Tensor,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    chosen_eps: Tensor,
    softcap: float,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    eps: float,
    refresh_every: int,
    decay: float,
) -> None:
    due = steps % refresh_every == 0
    steps += 1
    flat.copy_(chosen_eps == 0)
    if _devices.is_readable(due) and not due:
        return
    # elsewhere a call that is not due looks at no row
    targets = torch.where(due, targets.long(), ignore_index)
    head = (softcap, logit_scale, temperature, ignore_index)
    hits, mass = torch.ops.gemma_ext.cce_column_stats(
        e, c, targets, bias, lse, *head, eps, _SAMPLE_ROWS
    )
    total = mass.sum()
    keep = count.any().double() * decay
    new_count = keep * count + (1 - keep) * hits / total
    new_prob = keep * prob + (1 - keep) * mass / total
    # the count ties for all columns nobody needs: their probability orders those
    new_order = torch.argsort(new_count + 1e-3 * new_prob, descending=True, stable=True)
    for old, new in ((count, new_count), (prob, new_prob), (order, new_order)):
        old.copy_(torch.where(total > 0, new, old))


@_observe.register_fake
def _(*_args) -> None:
    return None
