"""Memory that is handed out and taken back in the same order."""

from __future__ import annotations

import mmap
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


class Ring:
    """One block of bytes, used round and round, so that its pages are faulted in once.

    Args:
        nbytes: of the block.
        pinned: for copies to a card.
    """

    def __init__(self, nbytes: int, pinned: bool = False) -> None:
        if pinned:
            self._memory = torch.empty(padded(nbytes), dtype=torch.uint8, pin_memory=True)
        else:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            block = mmap.mmap(-1, padded(max(nbytes, 1)), flags)
            with suppress(OSError):  # a kernel without large pages
                block.madvise(mmap.MADV_HUGEPAGE)
            self._memory = torch.frombuffer(block, dtype=torch.uint8)
        self._spans: deque[tuple[int, int]] = deque()

    def take(self, nbytes: int) -> Tensor | None:
        """Whole pages of `nbytes` > 0 that are not in use, or None until enough was given back."""
        size, capacity = padded(nbytes), self._memory.numel()
        begin, end = 0, capacity
        if self._spans:
            oldest, newest = self._spans[0], self._spans[-1]
            begin = newest[1]
            if newest < oldest:  # wrapped
                end = oldest[0]
            elif capacity - begin < size:
                begin, end = 0, oldest[0]
        if end - begin < size:
            return None
        self._spans.append((begin, begin + size))
        return self._memory[begin : begin + nbytes]

    def give_back(self) -> None:
        """The run that was taken first is free again."""
        self._spans.popleft()


def padded(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
