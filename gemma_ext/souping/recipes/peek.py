"""Tensors read piece by piece, for what looks at models without merging them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from gemma_ext.souping.engine.files.checkpoint import Stored
from gemma_ext.souping.engine.files.sources import Source

PIECE = 1 << 20  # elements


def read_pieces(
    sources: list[Source], shape: tuple[int, ...], piece: int = PIECE
) -> Iterator[list[Tensor]]:
    """The same run of whole rows of every source, flat, one run after another.

    Args:
        sources: of one output tensor.
        shape: of that tensor; of a source with more rows the first are read.
        piece: elements of a run, at least a row.
    """
    width = math.prod(shape[1:])
    rows = shape[0] if shape else 1
    step = max(1, piece // max(width, 1))
    with ExitStack() as stack:
        reader = _Reader(stack)
        for first in range(0, rows, step):
            start, stop = first * width, min(first + step, rows) * width
            yield [_read(source, reader, start, stop) for source in sources]


def read_whole(source: Source, shape: tuple[int, ...]) -> Tensor:
    """All of a tensor, in the dtype that the source delivers."""
    pieces = [piece for (piece,) in read_pieces([source], shape)]
    return torch.cat(pieces).view(shape) if pieces else torch.empty(shape)


def _read(source: Source, reader: _Reader, start: int, stop: int) -> Tensor:
    staged = torch.empty(source.staged_bytes(start, stop), dtype=torch.uint8)
    source.request(reader, start, stop, staged)
    return source.deliver(start, stop, staged)


class _Reader:
    """Reads at once what it is asked for."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack, self.files = stack, {}

    def read(self, stored: Stored, start: int, to: Tensor, direct: bool = False) -> None:
        if stored.tensor is not None:
            data = stored.tensor.view(-1).view(torch.uint8)
            to.copy_(data[start : start + len(to)])
            return
        if stored.path not in self.files:
            self.files[stored.path] = os.open(stored.path, os.O_RDONLY)
            self.stack.callback(os.close, self.files[stored.path])
        view, done = memoryview(to.numpy()), 0
        while done < len(view):
            got = os.preadv(self.files[stored.path], [view[done:]], stored.offset + start + done)
            if not got:
                raise OSError(f"{stored.path}: ended while it was read")
            done += got
