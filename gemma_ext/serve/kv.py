"""Keys, values and hidden states of requests that wait in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Memory(Protocol):
    kv_pool: Tensor  # [L, pages, 2, n_kv, 16, hd]
    bank: Tensor  # [slots, D]


class HostStore:
    """Copies of pages and bank rows, by request.

    Args:
        memory: of the runner.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def save(self, request: int, pages: Sequence[int], slots: Sequence[int]) -> None:
        at = self._places(pages, slots)
        kept = self.memory.kv_pool[:, at[0]], self.memory.bank[at[1]]
        self._kept[request] = tuple(part.cpu() for part in kept)

    def load(self, request: int, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Puts them back, into as many pages and slots, and forgets them."""
        at, (kv, hidden) = self._places(pages, slots), self._kept.pop(request)
        with torch.inference_mode():
            self.memory.kv_pool[:, at[0]] = kv.to(self.memory.kv_pool.device)
            self.memory.bank[at[1]] = hidden.to(self.memory.bank.device)

    def forget(self, request: int) -> None:
        self._kept.pop(request, None)

    @property
    def bytes(self) -> int:
        """Host memory in use."""
        return sum(part.nbytes for kept in self._kept.values() for part in kept)

    def _places(self, *indices: Sequence[int]) -> list[Tensor]:
        return [torch.tensor(list(i), dtype=torch.int64) for i in indices]
