"""Trims whose threshold is one for the whole model: three readings of "the largest share"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from gemma_ext.ops.souping import Cut, Magnitudes, Mask, Part
from gemma_ext.souping.method import Method, Parameter, TensorInfo, Values

KEEP_EQUAL = Parameter("keep_equal", False, kind=bool)
"""Keep what equals the threshold."""


def authors(density: float, elements: int) -> int:
    """The (D - int(d D))-th smallest, counted from the largest: TIES' authors."""
    return min(elements, int(density * elements) + 1)


def mergelm(density: float, elements: int) -> int:
    """The int((1 - d) D)-th smallest, counted from the largest: MergeLM."""
    return elements + 1 - int((1 - density) * elements)


def localize(density: float, elements: int) -> int:
    """The smallest of the int(d D) largest: Localize-and-Stitch."""
    return int(density * elements)


@dataclass
class TrimState:
    """One tensor between the calls for it."""

    values: Values
    mask: Mask | None = None


class ModelTrim(Method):
    """Finds the threshold of each model over all of its tensors.

    Densities cannot differ between tensors. Nothing is trimmed at density 1 and everything at 0.

    Attributes:
        rank: from (density, elements) to the place, from the largest down, of the threshold.
        equals: whether "all" elements equal to the threshold stay, or "none"; overruled by the
            parameter `keep_equal` of a method that has it.
    """

    base = "needed"
    model_wide = True
    surveys = 2
    equals: ClassVar[str] = "all"

    def __init__(self) -> None:
        self.magnitudes: Magnitudes | None = None
        self.densities: list[float] = []
        self.elements = 0
        self.settled = False

    @staticmethod
    def rank(density: float, elements: int) -> int:
        raise NotImplementedError

    def begin(self, tensor: TensorInfo, values: Values) -> TrimState:
        densities = values.of("density")
        if self.magnitudes is None:
            self.magnitudes, self.densities = Magnitudes(len(densities)), densities
        if densities != self.densities:
            raise ValueError(
                f"expected one density for the whole model with {self.name}, "
                f"got {densities} for {tensor.name} after {self.densities}"
            )
        self.elements += tensor.numel
        return TrimState(values)

    def skips(self, step: int, state: TrimState) -> bool:
        return step < 2 and self.settled

    def survey(self, step: int, part: Part, state: TrimState) -> None:
        if not self.settled:
            self.magnitudes.survey([part])

    def settle_model(self, step: int, states: Mapping[str, Any]) -> None:
        if self.settled:
            return
        wanted = [self.rank(d, self.elements) if 0 < d < 1 else 0 for d in self.densities]
        self.magnitudes.settle(wanted)
        self.settled = self.magnitudes.settled
        if self.settled:
            for state in states.values():
                state.mask = Mask(keep=self._cut(state.values))

    def _cut(self, values: Values) -> Cut:
        keep_equal = values.merge.get("keep_equal", self.equals == "all")
        cut = self.magnitudes.cut().resolved("all" if keep_equal else "none")
        whole = torch.tensor([[d >= 1 for d in self.densities]], device=cut.bits.device)
        every = Cut.above(0.0, len(self.densities), inclusive=True)
        return Cut(
            torch.where(whole, every.bits.to(cut.bits), cut.bits),
            torch.where(whole, every.ties.to(cut.ties), cut.ties),
        )
