"""Parameter values of a recipe: one number, or one that depends on depth or on the tensor's name.

weight: 0.5                                        the same everywhere
weight: [0, 1]                                     linear in depth, first layer to last
weight: [{filter: mlp, value: 0.5}, {value: 0}]    the first filter in the tensor's name
mode: [a, b]                                       steps: what is no number does not interpolate
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_ext.souping.recipes.marks import Entry


@dataclass(frozen=True)
class Setting:
    """A parameter as it stands in the recipe.

    Attributes:
        entry: its place.
        gradient: numbers along the depth.
        steps: values along the depth that hold until the next.
        filters: (part of a name, or None for any; setting), in order.
        scalar: where none of these is given.
    """

    entry: Entry
    scalar: Any = None
    gradient: tuple[float, ...] = ()
    steps: tuple[Any, ...] = ()
    filters: tuple[tuple[str | None, Setting], ...] = ()

    def at(self, name: str, depth: float) -> Any:
        """The value for a tensor; None if no filter fits.

        Args:
            name: of the tensor.
            depth: 0 in the first layer of a slice and outside of layers, 1 in the last layer.
        """
        if self.filters:
            for part, setting in self.filters:
                if part is None or part in name:
                    return setting.at(name, depth)
            return None
        if self.gradient:
            place = depth * (len(self.gradient) - 1)
            low = min(int(place), len(self.gradient) - 1)
            high = min(low + 1, len(self.gradient) - 1)
            share = place - low
            return (1 - share) * self.gradient[low] + share * self.gradient[high]
        if self.steps:
            return self.steps[int(depth * (len(self.steps) - 1))]
        return self.scalar

    def scalars(self) -> list[tuple[Entry, Any]]:
        """Every value that `at` may start from, with its place."""
        if self.filters:
            return [pair for _, setting in self.filters for pair in setting.scalars()]
        if self.gradient or self.steps:
            values = self.gradient or self.steps
            return list(zip(self.entry.items(), values, strict=True))
        return [(self.entry, self.scalar)]


Settings = Mapping[str, Setting]


def read_settings(entry: Entry | None) -> dict[str, Setting]:
    """The keys below a `parameters:`."""
    if entry is None:
        return {}
    return {name: read_setting(value) for name, value in entry.mapping().items()}


def read_setting(entry: Entry) -> Setting:
    """One value.

    Raises:
        RecipeError: an empty list, one that mixes filters with values, or one without a value.
    """
    if entry.shape == "scalar":
        return Setting(entry, scalar=_scalar(entry))
    if entry.shape == "mapping":
        return Setting(entry, filters=(_filter(entry),))
    items = entry.items()
    if not items:
        raise entry.error("expected at least one value, got an empty list")
    if all(item.shape == "mapping" for item in items):
        return Setting(entry, filters=tuple(_filter(item) for item in items))
    for item in items:
        if item.shape != "scalar":
            raise item.error("expected a value: filters and values do not mix in one list")
    values = tuple(_scalar(item) for item in items)
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return Setting(entry, gradient=tuple(map(float, values)))
    return Setting(entry, steps=values)


def _filter(entry: Entry) -> tuple[str | None, Setting]:
    keys = entry.mapping(("filter", "value"))
    if "value" not in keys:
        raise entry.error("expected a value beside the filter")
    part = keys["filter"].text() if "filter" in keys else None
    return None if part == "*" else part, read_setting(keys["value"])


def _scalar(entry: Entry) -> Any:
    """Numbers that YAML 1.1 takes for text, as 1e-5, are numbers here."""
    value = entry.value
    if value is None:
        raise entry.error("expected a value, got nothing")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if not isinstance(value, (bool, int, float)):
        raise entry.error(f"expected a number, true, false or text, got {value!r}")
    if not math.isfinite(value):
        raise entry.error(f"expected a finite number, got {value}")
    return value
