"""What a tick tells the host: copies that are under way until somebody waits for them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemma_ext.serve.sampling import Sampled

TOLD = ("id", "row", "pos", "token", "depth", "filled", "how")
"""Columns of what is told of a request that the head has read."""
DRAWN, LEFT, FILLED = 1, 2, 3
"""How: a token was drawn, or its draw is left to the host, or a complete output owes nothing."""


class News(NamedTuple):
    """What a tick did, on the host.

    Attributes:
        drawn, parked: int64 [n, 6] request, row, position, token (of parked ones none), depth, and
            the positions that have all loops.
        filled: int64 [n] requests of complete outputs whose every position has all loops now.
        ran: rows, current ones, owed ones and loops of the block.
        queues: tokens that wait for the head behind it, and those that may run, where several are
            to wait.
        sampled: of `drawn`.
    """

    drawn: np.ndarray
    parked: np.ndarray
    filled: np.ndarray
    ran: tuple[int, ...]
    queues: tuple[int, ...]
    sampled: Sampled


class Flight:
    """A tick under way, and the copies of what it tells."""

    def __init__(self, told: Tensor, likely: tuple[Tensor, ...] | None) -> None:
        self._event = None
        if told.device.type != "cuda":
            self._told, self._likely = told.clone(), likely and tuple(x.clone() for x in likely)
            return
        self._told, self._likely = _fetch(told), likely and tuple(map(_fetch, likely))
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(told.device))

    def land(self) -> News:
        """Waits for the tick."""
        if self._event is not None:
            self._event.synchronize()
        told = self._told.numpy()
        how = told[1:, 6]
        drawn, parked = (told[1:, :6][how == kind] for kind in (DRAWN, LEFT))
        at = torch.from_numpy(np.flatnonzero(how == DRAWN))
        ids = torch.from_numpy(drawn[:, 3].astype(np.int32))
        likely = (None,) * 3 if self._likely is None else (x[at] for x in self._likely)
        filled = told[1:, 0][how == FILLED]
        ran, queues = tuple(told[0, :4].tolist()), tuple(told[0, 4:6].tolist())
        return News(drawn, parked, filled, ran, queues, Sampled(ids, *likely))


def _fetch(x: Tensor) -> Tensor:
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)
