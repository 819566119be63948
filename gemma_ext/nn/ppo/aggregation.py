"""From losses of tokens to the loss of a batch, exactly, in any number of pieces and ranks.

    loss = sum_n w_n l_n          N tokens, S sequences with a token, T_b tokens of sequence b

| mode                    | w_n               |                                            |
|-------------------------|-------------------|--------------------------------------------|
| token-mean              | 1 / N             | every token alike (DAPO)                   |
| seq-mean-token-sum      | 1 / S             |                                            |
| seq-mean-token-mean     | 1 / (S T_b)       | every sequence alike (GRPO)                |
| seq-mean-token-sum-norm | 1 / (S horizon)   | a constant divisor (Dr. GRPO)              |

N and S count the whole batch of an optimiser step, of all micro-batches and ranks: the losses of
the pieces then simply add up. (DDP averages gradients: multiply by its world size.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gemma_ext.nn.ppo.packing import check_lengths, spread
from gemma_ext.nn.ppo.whitening import reduced_sum

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


class Counts(NamedTuple):
    """Tokens and sequences (those with a token) of one optimiser step."""

    tokens: int
    sequences: int


def count(lengths: Tensor, group: dist.ProcessGroup | None = None) -> Counts:
    """The counts of sequences of `lengths` [B], summed over the ranks of `group`."""
    both = torch.stack([lengths.sum(), (lengths > 0).sum()]).long()
    return Counts(*reduced_sum(both, group).tolist())


def token_weights(
    lengths: Tensor,
    mode: str = "token-mean",
    *,
    counts: Counts | None = None,
    horizon: int | None = None,
) -> Tensor:
    """w [N], float32, of packed sequences of `lengths` [B].

    Args:
        mode: one of `AGGREGATIONS`.
        counts: of the whole optimiser step; those of `lengths` for None.
        horizon: divisor of "seq-mean-token-sum-norm", the longest response.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"expected mode to be one of {', '.join(AGGREGATIONS)}, got {mode!r}")
    normed = mode == "seq-mean-token-sum-norm"
    if normed and (horizon is None or horizon < 1):
        raise ValueError(f"expected a horizon >= 1 for {mode!r}, got {horizon}")
    tokens, sequences = counts or count(lengths)
    # a piece without any token has no weight to give; max only spares it the division by 0
    ones = torch.ones_like(lengths, dtype=torch.float64)
    if mode == "token-mean":
        weight = ones / max(tokens, 1)
    else:
        weight = ones / max(sequences, 1)
    if mode == "seq-mean-token-mean":
        weight = weight / lengths.clamp(min=1)
    if normed:
        weight = weight / horizon
    return spread(weight.float(), lengths)


def aggregate(
    loss: Tensor,
    lengths: Tensor,
    mode: str = "token-mean",
    *,
    counts: Counts | None = None,
    horizon: int | None = None,
) -> Tensor:
    """The scalar sum_n w_n loss_n of packed losses [N]; 0 with a graph for N = 0."""
    check_lengths(lengths, len(loss))
    return (loss * token_weights(lengths, mode, counts=counts, horizon=horizon)).sum()
