"""An engine in a thread of its own, asked from an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from gemma_ext.serve.batch import Batch, EngineBusy, EngineStopped, RequestExpired
from gemma_ext.serve.protocol import Engine, Event, Limits, Request, Stats


class AsyncEngine:
    """Steps an engine while there is work; every call of it happens in one thread.

    Args:
        make: gives the engine; called in the thread, since some device state belongs to a thread.
        finish: called in the thread when no step will come any more.
        most_open: requests that may be open at a time.
        stall_seconds: a step that takes longer is a `trouble`.

    Attributes:
        limits: of the engine, from `start` on.
        stats: of the engine after its last step.
    """

    limits: Limits

    def __init__(
        self,
        make: Callable[[], Engine],
        *,
        finish: Callable[[], None] = lambda: None,
        most_open: int = 256,
        stall_seconds: float = 120.0,
    ) -> None:
        if most_open < 1:
            raise ValueError(f"most_open: expected at least 1, got {most_open}")
        self.most_open, self.stall_seconds = most_open, stall_seconds
        self.stats = Stats()
        self._make, self._finish = make, finish
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._step_began: float | None = None
        # of the loop's thread
        self._batches: set[Batch] = set()
        self._unanswered: set[asyncio.Future[None]] = set()
        self._draining = False
        self._failure: EngineStopped | None = None
        # of the engine's thread
        self._places: dict[int, tuple[Batch, int]] = {}

    @property
    def open(self) -> int:
        """Requests of batches that are not closed."""
        return sum(len(batch.requests) for batch in self._batches)

    @property
    def trouble(self) -> str | None:
        """Why a request that is submitted now would not be answered, if it would not."""
        if self._failure is not None:
            return str(self._failure)
        if self._draining:
            return "the server is shutting down"
        began = self._step_began
        if began is not None and time.monotonic() - began > self.stall_seconds:
            return f"a step of the engine takes longer than {self.stall_seconds:g} seconds"
        return None

    async def start(self) -> None:
        """Makes the engine; raises what `make` raises."""
        self._loop = asyncio.get_running_loop()
        made = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(made,), name="engine", daemon=True)
        self._thread.start()
        await made

    async def submit(self, *requests: Request, seconds: float | None = None) -> Batch:
        """Queues all of the requests, or none; `close` has to be called for what it returns.

        Args:
            seconds: after which taking events raises a RequestExpired; None for no end.

        Raises:
            ValueError: the engine can never answer one of them.
            EngineBusy: more than `most_open` would be open.
            EngineStopped: the engine failed or is being shut down.
        """
        if self._failure is not None or self._draining:
            raise EngineStopped(self.trouble)
        if self.open + len(requests) > self.most_open:
            raise EngineBusy(f"{self.open} of {self.most_open} requests are open, try again later")
        batch = Batch(requests)
        self._batches.add(batch)
        done = self._loop.create_future()
        self._unanswered.add(done)
        self._tell(lambda: self._submit(batch, done))
        try:
            await done
        except BaseException:  # of a client that left while it waited, too
            self.close(batch)
            raise
        finally:
            self._unanswered.discard(done)
        if seconds is not None:
            expired = RequestExpired(f"the answer took longer than {seconds:g} seconds")
            batch._timer = self._loop.call_later(seconds, batch._queue.put_nowait, expired)
        return batch

    def cancel(self, batch: Batch, place: int) -> None:
        """Ends one request of a batch: no event of it is taken any more."""
        if place in batch._left:
            batch._left.discard(place)
            self._tell(lambda: self._cancel(batch, [place]))

    def close(self, batch: Batch) -> None:
        """Ends what has not ended, and makes room for others."""
        self._batches.discard(batch)
        if batch._timer is not None:
            batch._timer.cancel()
        if batch._left:
            places = list(batch._left)
            batch._left.clear()
            self._tell(lambda: self._cancel(batch, places))

    async def drain(self, seconds: float) -> bool:
        """Takes no request any more and waits until all are closed; false if some are not."""
        self._draining = True
        end = time.monotonic() + seconds
        while self._batches and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._batches

    async def stop(self, seconds: float = 10.0) -> None:
        """Ends the thread, and what is open with an EngineStopped."""
        self._end_all(EngineStopped("the server is shutting down"))
        self._stopping = True
        self._tell(lambda: None)
        await asyncio.to_thread(self._thread.join, seconds)

    def _end_all(self, error: EngineStopped) -> None:
        self._failure = self._failure or error
        for batch in self._batches:
            batch._queue.put_nowait(error)
        for done in self._unanswered:
            _settle(done, error)

    def _tell(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    # from here on in the engine's thread

    def _run(self, made: asyncio.Future[None]) -> None:
        try:
            self._engine = self._make()
            self.stats = self._engine.stats()
            self.limits = self._engine.limits
        except BaseException as error:
            self._to_loop(_settle, made, error)
            return
        self._to_loop(_settle, made, None)
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:
            logging.getLogger(__name__).exception("the engine failed")
            sentence = f"the engine failed: {type(error).__name__}: {error}"
            self._to_loop(self._end_all, EngineStopped(sentence))
        finally:
            self._finish()

    def _turn(self) -> None:
        with self._wake:
            if not self._commands and not self._engine.has_work():
                self._wake.wait()
        while self._commands:
            self._commands.popleft()()
        if self._engine.has_work():
            self._step_began = time.monotonic()
            events = self._engine.step()
            self._step_began = None
            self._deliver(events)
        self.stats = self._engine.stats()

    def _submit(self, batch: Batch, done: asyncio.Future[None]) -> None:
        try:
            for place, request in enumerate(batch.requests):
                id = self._engine.submit(request)
                batch._ids[place] = id
                self._places[id] = (batch, place)
        except ValueError as error:
            self._cancel(batch, range(len(batch.requests)))
            self._to_loop(_settle, done, error)
        else:
            self._to_loop(_settle, done, None)

    def _cancel(self, batch: Batch, places: list[int] | range) -> None:
        for place in places:
            id = batch._ids[place]
            if id is not None and self._places.pop(id, None) is not None:
                self._engine.cancel(id)

    def _deliver(self, events: list[Event]) -> None:
        found = [
            (*self._places[event.request], event)
            for event in events
            if event.request in self._places  # else cancelled in the same step
        ]
        for _, _, event in found:
            if event.finish_reason is not None:
                del self._places[event.request]
        if found:
            self._to_loop(_hand_over, found)

    def _to_loop(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function, *arguments)


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _hand_over(found: list[tuple[Batch, int, Event]]) -> None:
    for batch, place, event in found:
        batch._queue.put_nowait((place, event))
