"""What a merge does with M deltas: which elements count, who agrees, how they add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Numbers = float | Sequence[float] | Sequence[Sequence[float]] | Tensor
"""One number for all models, [M], or [T, M] for T parts."""

NEVER = 0x7FFFFFFF
"""`Cut.bits` above every magnitude."""


@dataclass(frozen=True)
class Cut:
    """The largest magnitudes: those above a threshold and, in order of position, some equal to it.

    Attributes:
        bits: int32 [G, S], the threshold as float32 bits; G parts (1: one cut for all of them), S
            models, 1 for the variance.
        ties: int64 [G, S], how many elements equal to the threshold are still to be taken. Ops that
            use a cut count this down, so that a tensor can come in parts; `fresh` starts again.
        quantity: "delta", a model's own |delta|, or "variance" over the models, for all of them.
    """

    bits: Tensor
    ties: Tensor
    quantity: str = "delta"

    @staticmethod
    def above(
        threshold: float,
        models: int,
        *,
        inclusive: bool = False,
        device: torch.device | str = "cpu",
    ) -> Cut:
        """|delta| > threshold, or >= where `inclusive`; for tensors on `device`."""
        bits = int(torch.tensor(float(threshold)).view(torch.int32))
        full = torch.full((1, models), bits, dtype=torch.int32, device=device)
        return Cut(full, full.long()).resolved("all" if inclusive else "none")

    def resolved(self, ties: str) -> Cut:
        """The same threshold with "all" elements equal to it, or "none"."""
        if ties not in ("all", "none"):
            raise ValueError(f"expected ties to be 'all' or 'none', got {ties!r}")
        everything = torch.iinfo(torch.int64).max
        left = torch.full_like(self.ties, everything if ties == "all" else 0)
        # a cut that takes nothing has no element at its threshold either
        return replace(self, ties=torch.where(self.bits == NEVER, 0, left))

    def fresh(self) -> Cut:
        """A copy whose ties nobody has counted down yet; taken before the first use."""
        return replace(self, ties=self.ties.clone())


@dataclass(frozen=True)
class Mask:
    """The elements of a delta that count; without any option all of them.

    Attributes:
        keep: only the largest.
        drop: not the largest (of a cut that takes fewer than `keep`).
        density: each of them with this probability, [M] or [T, M]; `seed` of the op says which.
    """

    keep: Cut | None = None
    drop: Cut | None = None
    density: Numbers | None = None


@dataclass(frozen=True)
class RowMask:
    """The elements of a delta that count, chosen in each row of the last dimension; parts hold
    whole rows, and a tensor of one dimension is one row.

    In the order of a row from the largest magnitude down (lowest column first among equals),
    places `drop` .. `drop` + `keep` count; of those each with a probability that rises linearly
    from `density - epsilon` at the smallest to `density + epsilon` at the largest element.

    Attributes:
        keep: [M] or one number of elements per row; None: all.
        drop: [M] or one number.
        density, epsilon: [M] or one number; no density: no draw.
        spread: "rank": linear in the place; "value": in the magnitude between the row's ends.
        rescale: divide each survivor by its probability.
    """

    keep: int | Sequence[int] | None = None
    drop: int | Sequence[int] = 0
    density: float | Sequence[float] | None = None
    epsilon: float | Sequence[float] = 0.0
    spread: str = "rank"
    rescale: bool = False

    def __post_init__(self) -> None:
        if self.spread not in ("rank", "value"):
            raise ValueError(f"expected spread to be 'rank' or 'value', got {self.spread!r}")
        if self.rescale and self.density is None:
            raise ValueError("expected a density with rescale=True, got None")


@dataclass(frozen=True)
class Rule:
    """How the M terms x_m = w_m mask_m delta_m / divide_m of an element become one.

    Attributes:
        election: who is in A: "none", every model whose mask is set; "sum", those whose term has
            the sign of the sum of the terms and is not 0; "count", of the sum of their signs.
        weighted: whether terms stand with their weights in the election.
        zero: the sign elected where that sum is 0: 1, -1 or 0 (then nobody agrees).
        combine: over A: "sum"; "mean", divided by |A|; "weighted_mean", divided by the sum of w_m
            (1 where that is 0); "max", the largest term, of equals the positive one.
    """

    election: str = "none"
    weighted: bool = True
    zero: int = 1
    combine: str = "sum"

    def __post_init__(self) -> None:
        for name, known in (
            ("election", ("none", "sum", "count")),
            ("zero", (1, -1, 0)),
            ("combine", ("sum", "mean", "weighted_mean", "max")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} to be one of {known}, got {getattr(self, name)}")
