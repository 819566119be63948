"""Requests under way, as an event loop sees them."""

from __future__ import annotations

import asyncio
import time

from gemma_ext.serve.protocol import Event, Request


class EngineError(RuntimeError):
    """A request cannot be answered, for a reason that is not its own."""


class EngineBusy(EngineError):
    """As many requests are open as may be; try again later."""


class EngineStopped(EngineError):
    """The engine failed or is being shut down."""


class RequestExpired(EngineError):
    """The time of a request is over."""


class Batch:
    """Requests that were submitted together, and their events as they come.

    At most one event per token waits to be taken, so what a slow reader costs is bounded.

    Attributes:
        submitted: `time.monotonic()` when.
    """

    def __init__(self, requests: tuple[Request, ...]) -> None:
        self.requests = requests
        self.submitted = time.monotonic()
        self._ids: list[int | None] = [None] * len(requests)  # None: not submitted, or ended
        self._left = set(range(len(requests)))
        self._queue: asyncio.Queue[tuple[int, Event] | EngineError] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None

    async def take(self) -> list[tuple[int, Event]]:
        """(place of the request, event) pairs, at least one; empty when all requests have ended.

        Raises:
            EngineError: the batch cannot be answered any further.
        """
        taken: list[tuple[int, Event]] = []
        while self._left and (not taken or not self._queue.empty()):
            item = await self._queue.get()
            if isinstance(item, EngineError):
                raise item
            place, event = item
            if place in self._left:  # else it was cancelled meanwhile
                taken.append(item)
            if event.finish_reason is not None:
                self._left.discard(place)
        return taken
