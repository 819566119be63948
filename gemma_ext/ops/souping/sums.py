"""Sums over the elements of parts, in float64 and in an order that no cutting changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_ext.ops.souping import inputs, op, plain
from gemma_ext.ops.souping.impls import is_reference
from gemma_ext.ops.souping.options import per_part
from gemma_ext.ops.souping.parts import Part
from gemma_ext.ops.souping.rules import Mask, Numbers, RowMask, Rule


class _Running:
    """Sums [G, Q] whose order the parts of a tensor share, and what is open of them."""

    def __init__(self, groups: int, quantities: int, impl: str) -> None:
        is_reference(impl)
        self._impl = impl
        self._groups = groups
        self._state = torch.zeros(groups, quantities, op.STATE, dtype=torch.float64)

    def _open(
        self, parts: Sequence[Part], groups: Sequence[int] | int, models: int
    ) -> tuple[bool, list[int]]:
        """Whether the reference serves, and a group per part."""
        inputs.checked(parts, models=models)
        given = [groups] * len(parts) if isinstance(groups, int) else list(groups)
        if len(given) != len(parts) or not all(0 <= g < self._groups for g in given):
            raise ValueError(
                f"expected groups to be {len(parts)} numbers below {self._groups}, got {groups}"
            )
        device = inputs.device_of(parts)
        reference = is_reference(self._impl, device)
        if not reference and device is not None:
            self._state = self._state.to(device)
        return reference, given

    def _totals(self) -> Tensor:
        """float64 [G, Q]."""
        strands = self._state[..., :-2]
        while strands.shape[-1] > 1:
            half = strands.shape[-1] // 2
            strands = strands[..., :half] + strands[..., half:]
        total = self._state[..., -1] + (self._state[..., -2] + strands[..., 0])
        return torch.where(total.isnan(), torch.nan, total)  # devices differ in its sign


class Gram(_Running):
    """Inner products <x_i - base, x_j - base> of tensors that come in parts, in order.

        gram = Gram(models)
        for part in parts: gram.add([part])
        gram.value                      # float64 [1, M, M]

    Args:
        models: M.
        groups: G tensors, or sets of tensors, with sums of their own.
    """

    def __init__(self, models: int, *, groups: int = 1, impl: str = "auto") -> None:
        super().__init__(groups, models * (models + 1) // 2, impl)
        self.models = models

    def add(self, parts: Sequence[Part], groups: Sequence[int] | int = 0) -> None:
        """Takes `parts` in; those of one tensor in ascending order."""
        reference, groups = self._open(parts, groups, self.models)
        if not parts:
            return
        if not reference:
            op.sums_(parts, op.GRAM, groups, self._state)
            return
        i, j = torch.triu_indices(self.models, self.models)
        self._state[..., -1].index_add_(0, torch.tensor(groups), plain.gram(parts)[:, i, j])

    @property
    def value(self) -> Tensor:
        """float64 [G, M, M]."""
        totals = self._totals()
        i, j = torch.triu_indices(self.models, self.models, device=totals.device)
        found = totals.new_empty(len(totals), self.models, self.models)
        found[:, i, j] = totals
        found[:, j, i] = totals
        return found


class Norms(_Running):
    """Norms of the deltas of tensors that come in parts, in order, before and after a mask.

    Args:
        models: M.
        groups: G tensors, or sets of tensors, with sums of their own.
    """

    def __init__(self, models: int, *, groups: int = 1, impl: str = "auto") -> None:
        super().__init__(groups, 4 * models, impl)
        self.models = models
        self._top = torch.zeros(groups, models, 2, dtype=torch.float64)

    def add(
        self,
        parts: Sequence[Part],
        groups: Sequence[int] | int = 0,
        *,
        mask: Mask | RowMask | None = None,
        seed: int = 0,
    ) -> None:
        """Takes `parts` in; those of one tensor in ascending order. Cuts in `mask` count down."""
        reference, groups = self._open(parts, groups, self.models)
        mask = per_part(mask, len(parts), self.models)
        if not parts:
            return
        if not reference:
            self._top = self._top.to(self._state.device)
            op.sums_(parts, op.NORMS, groups, self._state, mask=mask, seed=seed, top=self._top)
            return
        for g, one in zip(groups, plain.norms(parts, mask, seed), strict=True):
            self._state[g, :, -1] += one[..., :2].flatten()
            self._top[g] = torch.maximum(self._top[g], one[..., 2])

    @property
    def value(self) -> Tensor:
        """float64 [G, M, 2, 3]: (all, masked) x (L1, squared L2, largest magnitude)."""
        totals = self._totals().reshape(self._groups, self.models, 2, 2)
        return torch.cat([totals, self._top.unsqueeze(-1)], -1)


def gram_rows(parts: Sequence[Part], *, impl: str = "auto") -> Tensor:
    """Inner products in each row of the last dimension, float64 [R, M, M]; of whole rows."""
    models = inputs.checked(parts)
    if not parts or not models:
        return torch.zeros(0, models, models, dtype=torch.float64)
    reference = is_reference(impl, inputs.device_of(parts))
    return (plain if reference else op).gram_rows(parts)


def dots(parts: Sequence[Part], along: Sequence[Tensor], *, impl: str = "auto") -> Tensor:
    """sum_i along_i (x_m,i - base_i) of whole tensors, float64 [T, M]; `along` [T] like bases."""
    models = inputs.checked(parts)
    if len(along) != len(parts):
        raise ValueError(f"expected along of {len(parts)} parts, got {len(along)}")
    for part, one in zip(parts, along, strict=True):
        inputs.check_like(part, "along", [one], 1)
    if is_reference(impl, inputs.device_of(parts)):
        return plain.dots(parts, along)
    running = _Running(len(parts), models, impl)
    _, groups = running._open(parts, range(len(parts)), models)
    if parts and models:
        op.sums_(parts, op.DOTS, groups, running._state, extras=along)
    return running._totals()


def overlaps(
    parts: Sequence[Part], mask: Mask | RowMask | None, *, seed: int = 0, impl: str = "auto"
) -> Tensor:
    """int64 [T, M, 2]: elements where a model's mask stands alone, and where others stand too.

    Parts of one tensor in ascending order where `mask` has cuts, which count their ties down.
    """
    return _counts(parts, op.OVERLAPS, Rule(), 1.0, mask, 1.0, seed, impl)


def sign_balance(
    parts: Sequence[Part],
    rule: Rule,
    weights: Numbers = 1.0,
    *,
    mask: Mask | RowMask | None = None,
    divide: Numbers = 1.0,
    seed: int = 0,
    impl: str = "auto",
) -> Tensor:
    """int64 [T]: elected signs added up, a sum of 0 as 0; what `Rule.zero` may depend on.

    Arguments as of `merge_`.
    """
    return _counts(parts, op.BALANCE, rule, weights, mask, divide, seed, impl)


def _counts(parts, kind, rule, weights, mask, divide, seed, impl) -> Tensor:
    models, count = inputs.checked(parts), len(parts)
    mask = per_part(mask, count, models)
    weights = inputs.table("weights", weights, count, models)
    divide = inputs.table("divide", divide, count, models)
    reference = is_reference(impl, inputs.device_of(parts))
    if not parts or not models:
        shape = (count, models, 2) if kind == op.OVERLAPS else (count,)
        return torch.zeros(shape, dtype=torch.int64)
    if not reference:
        return op.counts(parts, kind, rule, weights, mask, divide, seed)
    if kind == op.OVERLAPS:
        return plain.overlaps(parts, mask, seed)
    return plain.sign_balance(parts, rule, weights, mask, divide, seed)
