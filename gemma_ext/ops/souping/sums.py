"""Sums over the elements of parts, in float64 and in an order that no cutting changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_ext.ops.souping import inputs, plain
from gemma_ext.ops.souping.impls import is_reference
from gemma_ext.ops.souping.options import per_part
from gemma_ext.ops.souping.parts import Part
from gemma_ext.ops.souping.rules import Mask, RowMask, Rule


class Gram:
    """Inner products <x_i - base, x_j - base> of tensors that come in parts, in order.

        gram = Gram(models)
        for part in parts: gram.add([part])
        gram.value                      # float64 [1, M, M]

    Args:
        models: M.
        groups: G tensors, or sets of tensors, with sums of their own.
    """

    def __init__(self, models: int, *, groups: int = 1, impl: str = "auto") -> None:
        is_reference(impl)
        self.models, self.groups = models, groups
        self._total = torch.zeros(groups, models, models, dtype=torch.float64)

    def add(self, parts: Sequence[Part], groups: Sequence[int] | int = 0) -> None:
        """Takes `parts` in; those of one tensor in ascending order."""
        inputs.checked(parts, models=self.models)
        groups = group_of(parts, groups, self.groups)
        if parts:
            self._total.index_add_(0, torch.tensor(groups), plain.gram(parts))

    @property
    def value(self) -> Tensor:
        """float64 [G, M, M]."""
        return self._total.clone()


class Norms:
    """Norms of the deltas of tensors that come in parts, in order, before and after a mask.

    Args:
        models: M.
        groups: G tensors, or sets of tensors, with sums of their own.
    """

    def __init__(self, models: int, *, groups: int = 1, impl: str = "auto") -> None:
        is_reference(impl)
        self.models, self.groups = models, groups
        self._total = torch.zeros(groups, models, 2, 3, dtype=torch.float64)

    def add(
        self,
        parts: Sequence[Part],
        groups: Sequence[int] | int = 0,
        *,
        mask: Mask | RowMask | None = None,
        seed: int = 0,
    ) -> None:
        """Takes `parts` in; those of one tensor in ascending order. Cuts in `mask` count down."""
        models = inputs.checked(parts, models=self.models)
        groups = group_of(parts, groups, self.groups)
        mask = per_part(mask, len(parts), models)
        if not parts:
            return
        found = plain.norms(parts, mask, seed)
        for g, one in zip(groups, found, strict=True):
            self._total[g, ..., :2] += one[..., :2]
            self._total[g, ..., 2] = torch.maximum(self._total[g, ..., 2], one[..., 2])

    @property
    def value(self) -> Tensor:
        """float64 [G, M, 2, 3]: (all, masked) x (L1, squared L2, largest magnitude)."""
        return self._total.clone()


def group_of(parts: Sequence[Part], groups: Sequence[int] | int, count: int) -> list[int]:
    given = [groups] * len(parts) if isinstance(groups, int) else list(groups)
    if len(given) != len(parts) or not all(0 <= g < count for g in given):
        raise ValueError(f"expected groups to be {len(parts)} numbers below {count}, got {groups}")
    return given


def gram_rows(parts: Sequence[Part], *, impl: str = "auto") -> Tensor:
    """Inner products of each row of the last dimension, float64 [R, M, M]; parts hold whole rows."""
    inputs.checked(parts)
    is_reference(impl)
    return plain.gram_rows(parts)


def dots(parts: Sequence[Part], along: Sequence[Tensor], *, impl: str = "auto") -> Tensor:
    """sum_i along_i (x_m,i - base_i) of whole tensors, float64 [T, M]; `along` [T] like the bases."""
    inputs.checked(parts)
    is_reference(impl)
    return plain.dots(parts, along)


def overlaps(
    parts: Sequence[Part], mask: Mask | RowMask | None, *, seed: int = 0, impl: str = "auto"
) -> Tensor:
    """int64 [T, M, 2]: elements where a model's mask stands alone, and where others stand too."""
    models = inputs.checked(parts)
    is_reference(impl)
    return plain.overlaps(parts, per_part(mask, len(parts), models), seed)


def sign_balance(
    parts: Sequence[Part],
    rule: Rule,
    weights: object = 1.0,
    *,
    mask: Mask | RowMask | None = None,
    divide: object = 1.0,
    seed: int = 0,
    impl: str = "auto",
) -> Tensor:
    """int64 [T]: elected signs added up, those of a sum of 0 as 0; what `Rule.zero` may depend on."""
    models = inputs.checked(parts)
    is_reference(impl)
    count = len(parts)
    return plain.sign_balance(
        parts,
        rule,
        inputs.table("weights", weights, count, models),
        per_part(mask, count, models),
        inputs.table("divide", divide, count, models),
        seed,
    )
