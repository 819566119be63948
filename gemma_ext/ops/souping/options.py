"""Masks with their numbers spelt out for every part and model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gemma_ext.ops.souping import inputs
from gemma_ext.ops.souping.rules import Mask, RowMask

_ALL = (1 << 31) - 1


def per_part(mask: Mask | RowMask | None, parts: int, models: int) -> Mask | RowMask | None:
    """`mask` with [T, M] densities, or for rows [M] of everything; checked."""
    if mask is None:
        return None
    if isinstance(mask, RowMask):
        return replace(
            mask,
            keep=_each("keep", _ALL if mask.keep is None else mask.keep, models),
            drop=_each("drop", mask.drop, models),
            density=_each("density", mask.density, models),
            epsilon=_each("epsilon", mask.epsilon, models),
        )
    if not isinstance(mask, Mask):
        raise TypeError(f"expected mask to be a Mask, a RowMask or None, got {type(mask).__name__}")
    inputs.check_mask(mask, parts, models)
    if mask.density is None:
        return mask
    return replace(mask, density=inputs.table("density", mask.density, parts, models))


def _each(name: str, value: Any, models: int) -> list[Any]:
    given = list(value) if isinstance(value, Sequence) else [value] * models
    if len(given) != models:
        raise ValueError(f"expected {name} to be one number or [{models}], got [{len(given)}]")
    return given
