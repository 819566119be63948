"""One model's version of a tensor, delivered in runs of elements.

Bytes are asked for with `request`, ahead of time, and become a tensor with `deliver`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from gemma_ext.souping.engine.files.checkpoint import Stored
from gemma_ext.souping.engine.files.ring import PAGE
from gemma_ext.souping.engine.files.scales import descale

# fp8 holds no value that bfloat16 has not; float64 is rounded once
_WIDENED = {
    torch.float8_e4m3fn: torch.bfloat16,
    torch.float8_e5m2: torch.bfloat16,
    torch.float64: torch.float32,
}


class Reader(Protocol):
    """What moves bytes: `read` fills `to` (bytes) from byte `start` of a stored tensor.

    With `direct` the pages that hold `to` are the caller's as a whole, and may be overwritten.
    """

    def read(self, stored: Stored, start: int, to: Tensor, direct: bool = False) -> None: ...


class Adapter(Protocol):
    """Changes rows as they are read, such as W to W + scaling B A.

    Attributes:
        fingerprint: of everything the change depends on.
    """

    fingerprint: str

    def __call__(self, rows: Tensor, first: int) -> Tensor:
        """What rows [r, ...] from row `first` on become; float32, bfloat16 or float16."""
        ...


@dataclass(frozen=True)
class RowMap:
    """Rows of a tensor put together from rows of others, each the mean of what it names.

    Attributes:
        stored: tensors [any, D]; their dtypes may differ. `Stored.of` makes one of rows in memory.
        owners: [V, K] positions in `stored`, -1 for none. A row without any is zero.
        rows: [V, K] which of the owner's rows.
    """

    stored: Sequence[Stored]
    owners: Tensor
    rows: Tensor

    def __post_init__(self) -> None:
        for name, value in (("owners", self.owners), ("rows", self.rows)):
            if value.ndim != 2 or value.is_floating_point():
                raise ValueError(
                    f"RowMap: expected {name} to be [V, K] integers, got {value.dtype} "
                    f"{list(value.shape)}"
                )
        if self.owners.shape != self.rows.shape:
            raise ValueError(
                f"RowMap: expected rows {list(self.owners.shape)} like owners, "
                f"got {list(self.rows.shape)}"
            )
        widths = {tuple(stored.shape[1:]) for stored in self.stored}
        if len(widths) != 1 or any(len(stored.shape) != 2 for stored in self.stored):
            shapes = [list(stored.shape) for stored in self.stored]
            raise ValueError(f"RowMap: expected tensors of one width, got {shapes}")
        if bool(((self.owners < -1) | (self.owners >= len(self.stored))).any()):
            raise ValueError(
                f"RowMap: expected owners in -1 .. {len(self.stored) - 1}, got "
                f"{int(self.owners.min())} .. {int(self.owners.max())}"
            )
        counts = torch.tensor([stored.shape[0] for stored in self.stored])
        named = self.owners >= 0
        wrong = named & ((self.rows < 0) | (self.rows >= counts[self.owners.clamp(min=0)]))
        if bool(wrong.any()):
            row, slot = (int(i) for i in wrong.nonzero()[0])
            owner = self.stored[int(self.owners[row, slot])]
            raise ValueError(
                f"RowMap: expected a row below {owner.shape[0]}, got {int(self.rows[row, slot])} "
                f"for row {row}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.owners.shape[0], self.stored[0].shape[1]

    def runs(self, first: int, last: int) -> Iterator[tuple[Stored, int, int, int]]:
        """(tensor, its first row, output row from `first`, count) of rows [first, last)."""
        for slot in range(self.owners.shape[1]):
            owners, rows = self.owners[first:last, slot], self.rows[first:last, slot]
            breaks = (owners.diff() != 0) | (rows.diff() != 1)
            cuts = [0, *(breaks.nonzero().view(-1) + 1).tolist(), last - first]
            for begin, end in pairwise(cuts):
                owner = int(owners[begin])
                if owner >= 0:
                    yield self.stored[owner], int(rows[begin]), begin, end - begin


@dataclass(frozen=True)
class Source:
    """Where one model's version of an output tensor comes from.

    Attributes:
        stored: the tensor in its file. Where it has more rows than the output, the first count.
        rows: instead of `stored` row by row.
        adapt: what is done to the rows that are read.
    """

    stored: Stored
    rows: RowMap | None = None
    adapt: Adapter | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape if self.rows else self.stored.shape

    @property
    def row(self) -> int:
        """Elements of a row of the first dimension: runs are cut there unless `is_plain`."""
        return math.prod(self.shape[1:])

    @property
    def is_plain(self) -> bool:
        return self.rows is None and self.adapt is None and self.stored.scale is None

    def staged_bytes(self, start: int, stop: int) -> int:
        """How much memory `request` wants for elements [start, stop)."""
        if self.rows is None:
            return (stop - start) * self.stored.dtype.itemsize
        runs = self.rows.runs(start // self.row, stop // self.row)
        return sum(_padded(count * self.row * stored.dtype.itemsize) for stored, *_, count in runs)

    def place(self, start: int) -> int:
        """Where in a page of memory the bytes from element `start` on should begin: as in their
        file, so that they can be read without the page cache."""
        stored = self.stored
        if self.rows is not None or stored.tensor is not None:
            return 0
        at = stored.offset + start * stored.dtype.itemsize
        return 0 if at % stored.dtype.itemsize else at % PAGE

    def request(
        self, reader: Reader, start: int, stop: int, to: Tensor, direct: bool = False
    ) -> None:
        """Asks for the bytes of elements [start, stop); `direct` as in `Reader`."""
        if self.rows is None:
            reader.read(self.stored, start * self.stored.dtype.itemsize, to, direct)
            return
        at = 0
        for stored, row, _, count in self.rows.runs(start // self.row, stop // self.row):
            size = self.row * stored.dtype.itemsize
            reader.read(stored, row * size, to[at : at + count * size])
            at += _padded(count * size)

    def deliver(self, start: int, stop: int, staged: Tensor) -> Tensor:
        """The elements [start, stop), flat, once their bytes have come."""
        if self.rows is None:
            values = _values(self.stored, staged, start // max(self.row, 1))
        else:
            values = _mean_rows(self.rows, start // self.row, stop // self.row, staged)
        if self.adapt is not None:
            values = self.adapt(values.view(-1, *self.shape[1:]), start // self.row)
        return values.reshape(-1)


def _padded(size: int) -> int:
    return -(-size // 8) * 8  # so that any dtype's view of the next run is aligned


def _values(stored: Stored, staged: Tensor, first: int) -> Tensor:
    """The elements of bytes that begin with row `first`, flat."""
    values = staged.view(stored.dtype)
    if stored.scale is None:
        return widen(values)
    rows = values.view(-1, *stored.shape[1:])
    return descale(rows, stored.scale.whole, first, stored.shape[0] if stored.shape else 1).view(-1)


def widen(tensor: Tensor) -> Tensor:
    """As one of the dtypes that the ops take."""
    return tensor.to(_WIDENED.get(tensor.dtype, tensor.dtype))


def _mean_rows(rows: RowMap, first: int, last: int, staged: Tensor) -> Tensor:
    """[last - first, D]: float32 sums in the order of the slots, divided by how many there are."""
    width, at = rows.shape[1], 0
    out = torch.full((last - first, width), -0.0)  # the sum that keeps the sign of a zero
    for stored, row, begin, count in rows.runs(first, last):
        size = count * width * stored.dtype.itemsize
        piece = _values(stored, staged[at : at + size], row).view(count, width)
        out[begin : begin + count] += piece.float()
        at += _padded(size)
    counts = (rows.owners[first:last] >= 0).sum(1, keepdim=True)
    out.masked_fill_(counts == 0, 0.0)
    return out if int(counts.max()) <= 1 else out / counts.clamp(min=1)
