"""The exact k-th largest magnitude of streams too long to sort: radix select, two readings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_ext.ops.souping import inputs, op, plain, sample
from gemma_ext.ops.souping.impls import is_reference
from gemma_ext.ops.souping.parts import Part
from gemma_ext.ops.souping.plain import COARSE, FINE
from gemma_ext.ops.souping.rules import NEVER, Cut

QUANTITIES = ("delta", "variance")
Counts = int | Sequence[int] | Sequence[Sequence[int]] | Tensor


class Magnitudes:
    """Finds where the largest magnitudes of each model end, without holding or sorting them.

        magnitudes = Magnitudes(models)
        while not magnitudes.settled:                          # once or twice
            for part in parts: magnitudes.survey([part])
            magnitudes.settle(keep)
        cut = magnitudes.cut()

    The first reading counts the upper 15 bits of |float32 delta|, the second the lower 16. Deltas
    of bfloat16 seldom have any of these: then one reading says it all. Of parts that are all at
    hand, `find` does the whole.

    Counts of integers: any cutting, order or device gives the same cut. NaN is never counted.
    Memory: G M (2 + 2 cuts) histograms of 2^15 to 2^16 int64.

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
        for name, value in (("models", models), ("groups", groups), ("cuts", cuts)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"expected {name} to be an int of 1 or more, got {value!r}")
        is_reference(impl)
        self.models, self.groups, self.cuts, self.quantity = models, groups, cuts, quantity
        self.streams = models if quantity == "delta" else 1
        self._impl = impl
        self._start(torch.device("cpu"))

    def _start(self, device: torch.device, window: Tensor | None = None) -> None:
        self._step = 0
        self._coarse = torch.zeros(
            self.groups, self.streams, COARSE, dtype=torch.int64, device=device
        )
        self._zeros = torch.zeros(self.groups, self.streams, dtype=torch.int64, device=device)
        self._odd = torch.zeros_like(self._coarse) if self.quantity == "delta" else None
        self._window = window
        self._prefix = self._left = self._known = self._fine = self._bits = None

    @property
    def counts(self) -> Tensor:
        return self._coarse.sum(-1)

    @property
    def zeros(self) -> Tensor:
        return self._zeros

    @property
    def settled(self) -> bool:
        """Whether the cut is known. Waits for the device after the first `settle`."""
        return self._step > 1 or (self._step == 1 and bool(self._known.all()))

    def survey(self, parts: Sequence[Part], groups: Sequence[int] | int = 0) -> None:
        """Counts the elements of `parts`; `groups` says to which group each belongs."""
        groups = self._checked(parts, groups)
        if self._step > 1:
            raise ValueError("expected two readings of the parts, got a third")
        device = inputs.device_of(parts)
        reference = is_reference(self._impl, device)
        self._move_to(torch.device("cpu") if reference else device)
        if self._step == 1:
            self._open_fine()
        if not all(x.dtype == torch.bfloat16 for part in parts for x in inputs.tensors_of(part)):
            self._odd = None
        into = (self._coarse, self._zeros, self._odd, self._window, self._prefix, self._fine)
        (plain if reference else op).survey(parts, groups, self.quantity, *into)

    def _open_fine(self) -> None:
        if self._fine is None:
            self._fine = self._prefix.new_zeros((*self._prefix.shape, FINE))

    def _checked(self, parts: Sequence[Part], groups: Sequence[int] | int) -> Sequence[int]:
        inputs.checked(parts, models=self.models)
        if isinstance(groups, int):
            groups = [groups] * len(parts)
        if len(groups) != len(parts) or not all(0 <= g < self.groups for g in groups):
            raise ValueError(
                f"expected groups to be {len(parts)} numbers below {self.groups}, got {groups}"
            )
        return groups

    def _move_to(self, device: torch.device | None) -> None:
        if device in (None, self._coarse.device):
            return
        for name, held in list(vars(self).items()):
            if isinstance(held, Tensor):
                setattr(self, name, held.to(device))

    def settle(self, keep: Counts) -> None:
        """After all parts of a reading: `keep` elements are wanted, the same number both times.

        One number, [S], [S, cuts] or [G, S, cuts].
        """
        keep = self._wanted(keep).to(self._coarse.device)
        keep = torch.minimum(keep, self.counts.unsqueeze(-1)).clamp(min=0)
        nothing = keep == 0
        if self._step == 0:
            self._prefix, self._left = _bin_of(self._coarse.unsqueeze(2), keep)
            self._known, low = nothing, torch.zeros_like(keep)
            ties = self._left
            if self._odd is not None:
                ties = ties - self._odd.gather(-1, self._prefix)
                self._known = nothing | (ties > 0)
        elif self._step == 1:
            self._open_fine()
            low, ties = _bin_of(self._fine, self._left)
            self._fine = None
        else:
            raise ValueError("expected two calls of settle, got a third")
        self._bits = torch.where(nothing, NEVER, self._prefix << 16 | low)
        self._ties = torch.where(nothing, 0, ties)
        self._step += 1

    def _wanted(self, keep: Counts) -> Tensor:
        """[G, S, cuts]"""
        keep = torch.as_tensor(keep, dtype=torch.int64)
        if keep.dim() == 1:
            keep = keep.unsqueeze(-1)
        shape = (self.groups, self.streams, self.cuts)
        try:
            return keep.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"expected keep to be one number, [{self.streams}] or {list(shape)}, "
                f"got {list(keep.shape)}"
            ) from None

    def find(
        self, parts: Sequence[Part], keep: Counts, groups: Sequence[int] | int = 0
    ) -> Magnitudes:
        """All readings at once, of all parts there are; returns itself, settled.

        On the CPU a sample foretells the cuts: only bins around them are told apart, which takes a
        third of the time; where it was wrong, the parts are read again. Waits for the device.
        """
        groups, keep = self._checked(parts, groups), self._wanted(keep)
        if self._step > 0:
            raise ValueError("expected nothing to be settled before `find`")
        device, window = inputs.device_of(parts), None
        if not is_reference(self._impl, device) and device == torch.device("cpu"):
            window = sample.window(parts, keep, groups, self.quantity)
        if window is not None:
            self._start(window.device, window)
            self.survey(parts, groups)
            self.settle(keep)
            inside = (self._prefix > window[..., :1]) & (self._prefix < window[..., 1:])
            if not bool((inside | (self._bits == NEVER)).all()):
                self._start(window.device)
            self._window = None
        while not self.settled:
            self.survey(parts, groups)
            self.settle(keep)
        return self

    def cut(self, index: int = 0) -> Cut:
        """The cut, [G, S], with all of its ties left."""
        if not self.settled:
            raise ValueError(f"expected two readings before a cut, got {self._step}")
        bits = self._bits[..., index].to(torch.int32).contiguous()
        return Cut(bits, self._ties[..., index].clone(), self.quantity)


def _bin_of(histogram: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Which bin [..., B] holds the `keep`-th largest, and how many of that bin are among them."""
    down = histogram.flip(-1).cumsum(-1)
    down = down.expand(*keep.shape, down.shape[-1]).contiguous()
    place = torch.searchsorted(down, keep.unsqueeze(-1).clamp(min=1)).clamp(max=down.shape[-1] - 1)
    before = torch.where(place > 0, down.gather(-1, (place - 1).clamp(min=0)), 0)
    return (down.shape[-1] - 1 - place).squeeze(-1), keep - before.squeeze(-1)
