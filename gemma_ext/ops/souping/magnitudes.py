"""The exact k-th largest magnitude of streams too long to sort: radix select, two readings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_ext.ops.souping import inputs, op, plain
from gemma_ext.ops.souping.impls import is_reference
from gemma_ext.ops.souping.parts import Part
from gemma_ext.ops.souping.rules import NEVER, Cut

COARSE, FINE = 1 << 15, 1 << 16
QUANTITIES = ("delta", "variance")


class Magnitudes:
    """Finds where the largest magnitudes of each model end, without holding or sorting them.

        magnitudes = Magnitudes(models)
        for part in parts: magnitudes.survey([part])       # upper 15 bits of |float32 delta|
        magnitudes.settle(keep)
        for part in parts: magnitudes.survey([part])       # lower 16 bits
        magnitudes.settle(keep)
        cut = magnitudes.cut()

    Counts of integers: any cutting, order or device gives the same cut. NaN is never counted.
    Memory: G M (1 + 2 cuts) histograms of 2^15 to 2^16 int64.

    Args:
        models: M.
        groups: G sets of tensors that are cut on their own (one tensor, or a whole model, each).
        cuts: how many cuts are wanted of each.
        quantity: "delta", or "variance": the population variance over the models, one stream.

    Attributes:
        streams: S, M or for the variance 1.
        counts: int64 [G, S], elements seen, without NaN.
        zeros: int64 [G, S], of those exactly 0.
    """

    def __init__(
        self,
        models: int,
        *,
        groups: int = 1,
        cuts: int = 1,
        quantity: str = "delta",
        impl: str = "auto",
    ) -> None:
        if quantity not in QUANTITIES:
            raise ValueError(f"expected quantity to be one of {QUANTITIES}, got {quantity!r}")
        is_reference(impl)
        self.models, self.groups, self.cuts, self.quantity = models, groups, cuts, quantity
        self.streams = models if quantity == "delta" else 1
        self._impl = impl
        self._step = 0
        self._coarse = torch.zeros(groups, self.streams, COARSE, dtype=torch.int64)
        self._zeros = torch.zeros(groups, self.streams, dtype=torch.int64)
        self._prefix = self._left = self._fine = self._bits = None

    @property
    def counts(self) -> Tensor:
        return self._coarse.sum(-1)

    @property
    def zeros(self) -> Tensor:
        return self._zeros

    def survey(self, parts: Sequence[Part], groups: Sequence[int] | int = 0) -> None:
        """Counts the elements of `parts`; `groups` says to which group each belongs."""
        inputs.checked(parts, models=self.models)
        if isinstance(groups, int):
            groups = [groups] * len(parts)
        if len(groups) != len(parts) or not all(0 <= g < self.groups for g in groups):
            raise ValueError(
                f"expected groups to be {len(parts)} numbers below {self.groups}, got {groups}"
            )
        if self._step > 1:
            raise ValueError("expected two readings of the parts, got a third")
        device = inputs.device_of(parts)
        reference = is_reference(self._impl, device)
        self._move_to(torch.device("cpu") if reference else device)
        into = (self._coarse, self._zeros, self._prefix, self._fine)
        (plain if reference else op).survey(parts, groups, self.quantity, *into)

    def _move_to(self, device: torch.device | None) -> None:
        if device in (None, self._coarse.device):
            return
        for name in ("_coarse", "_zeros", "_prefix", "_left", "_fine"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held.to(device))

    def settle(self, keep: int | Sequence[int] | Tensor) -> None:
        """After all parts of a reading: `keep` elements are wanted, the same number both times.

        One number, [S], [S, cuts] or [G, S, cuts].
        """
        keep = torch.as_tensor(keep, dtype=torch.int64).to(self._coarse.device)
        if keep.dim() == 1:
            keep = keep.unsqueeze(-1)
        shape = (self.groups, self.streams, self.cuts)
        try:
            keep = keep.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"expected keep to be one number, [{self.streams}] or {list(shape)}, "
                f"got {list(keep.shape)}"
            ) from None
        keep = torch.minimum(keep, self.counts.unsqueeze(-1)).clamp(min=0)
        if self._step == 0:
            self._prefix, self._left = _bin_of(self._coarse.unsqueeze(2), keep)
            self._fine = torch.zeros(*shape, FINE, dtype=torch.int64, device=keep.device)
        elif self._step == 1:
            low, ties = _bin_of(self._fine, self._left)
            nothing = keep == 0
            self._bits = torch.where(nothing, NEVER, self._prefix << 16 | low)
            self._left = torch.where(nothing, 0, ties)
            self._fine = None
        else:
            raise ValueError("expected two calls of settle, got a third")
        self._step += 1

    def cut(self, index: int = 0) -> Cut:
        """The cut, [G, S], with all of its ties left."""
        if self._step < 2:
            raise ValueError(f"expected two readings before a cut, got {self._step}")
        bits = self._bits[..., index].to(torch.int32).contiguous()
        return Cut(bits, self._left[..., index].clone(), self.quantity)


def _bin_of(histogram: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Which bin [..., B] holds the `keep`-th largest, and how many of that bin are among them."""
    down = histogram.flip(-1).cumsum(-1)
    down = down.expand(*keep.shape, down.shape[-1]).contiguous()
    place = torch.searchsorted(down, keep.unsqueeze(-1).clamp(min=1)).clamp(max=down.shape[-1] - 1)
    before = torch.where(place > 0, down.gather(-1, (place - 1).clamp(min=0)), 0)
    return (down.shape[-1] - 1 - place).squeeze(-1), keep - before.squeeze(-1)
