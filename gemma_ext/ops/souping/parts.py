"""What every souping op works on: the same run of elements in M models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A run of consecutive elements of one named tensor, in each of M models.

    A whole tensor is a part with offset 0; a streamed one comes as many, and every op gives the
    same bits however a tensor is cut.

    Attributes:
        sources: M tensors of one shape; dtypes may differ (float32, bfloat16, float16).
        base: the model that deltas are taken from, same shape, or None.
        out: where results are written, same shape; may be `base` or one of `sources`.
        name: of the whole tensor. Random numbers depend on (seed, name, model, position) alone.
        offset: position in the flattened whole tensor of the first element here.
        models: what the position of each source counts as in random numbers; 0 .. M-1 by default.
    """

    sources: Sequence[Tensor]
    base: Tensor | None = None
    out: Tensor | None = None
    name: str = ""
    offset: int = 0
    models: Sequence[int] | None = None
