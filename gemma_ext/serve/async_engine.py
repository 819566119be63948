"""An engine in a thread of its own, asked from an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from gemma_ext.serve.protocol import Engine, Event, Request, Stats


class EngineError(RuntimeError):
    """The engine cannot answer: it failed, is full, or is being shut down."""


class EngineBusy(EngineError):
    """As many requests are open as may be; try again later."""


class EngineStopped(EngineError):
    """The engine failed or was shut down."""


@dataclass(eq=False)
class Stream:
    """The events of one request, in order; at most one per token, so the queue is bounded."""

    id: int = -1
    ended: bool = False
    _queue: asyncio.Queue[Event | EngineError] = field(default_factory=asyncio.Queue)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events up to the one with a finish reason.

        Raises:
            EngineError: the engine ended before the request did.
        """
        while True:
            item = await self._queue.get()
            if isinstance(item, EngineError):
                raise item
            yield item
            if item.finish_reason is not None:
                return


class AsyncEngine:
    """Steps an engine while there is work; every call of it happens in one thread.

    Args:
        make: gives the engine; called in the thread, since some device state belongs to a thread.
        most_open: requests that may be open at a time.
        stall_seconds: a step that takes longer makes `healthy` false.

    Attributes:
        limits: of the engine, from `start` on.
        stats: of the engine after its last step.
    """

    def __init__(
        self, make: Callable[[], Engine], *, most_open: int = 256, stall_seconds: float = 120.0
    ) -> None:
        if most_open < 1:
            raise ValueError(f"most_open: expected at least 1, got {most_open}")
        self.most_open, self.stall_seconds = most_open, stall_seconds
        self.stats = Stats()
        self._make = make
        self._open: set[Stream] = set()  # of the loop's thread
        self._unanswered: set[asyncio.Future[None]] = set()  # submissions; of the loop's thread
        self._streams: dict[int, Stream] = {}  # of the engine's thread
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._draining = False
        self._failure: EngineStopped | None = None
        self._step_began: float | None = None

    @property
    def open(self) -> int:
        """Requests that have been submitted and have not ended."""
        return len(self._open)

    @property
    def healthy(self) -> bool:
        """Whether a request that is submitted now can be expected to be answered."""
        began = self._step_began
        stalled = began is not None and time.monotonic() - began > self.stall_seconds
        return not (self._failure or self._draining or stalled)

    async def start(self) -> None:
        """Makes the engine; raises what `make` raises."""
        self._loop = asyncio.get_running_loop()
        made = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(made,), name="engine", daemon=True)
        self._thread.start()
        await made

    async def submit(self, *requests: Request) -> list[Stream]:
        """Queues requests together, or none of them.

        Raises:
            ValueError: the engine can never answer one of them.
            EngineBusy: more than `most_open` would be open.
            EngineStopped: the engine failed or is being shut down.
        """
        if self._failure is not None:
            raise self._failure
        if self._draining:
            raise EngineStopped("the server is shutting down")
        if self.open + len(requests) > self.most_open:
            raise EngineBusy(f"{self.open} of {self.most_open} requests are open; try again later")
        streams = [Stream() for _ in requests]
        self._open.update(streams)
        done = self._loop.create_future()
        self._unanswered.add(done)
        self._tell(lambda: self._submit(requests, streams, done))
        try:
            await done
        except BaseException:  # a client that left while it waited, too
            self.close(*streams)
            raise
        finally:
            self._unanswered.discard(done)
        return streams

    def close(self, *streams: Stream) -> None:
        """Cancels what has not ended; to be called for every stream, also for one that has."""
        left = [stream for stream in streams if stream in self._open]
        self._open.difference_update(left)
        if any(not stream.ended for stream in left):
            self._tell(lambda: self._cancel(left))

    async def drain(self, seconds: float) -> bool:
        """Takes no request any more and waits until all have ended; false if some have not."""
        self._draining = True
        end = time.monotonic() + seconds
        while self._open and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._open

    async def stop(self, seconds: float = 10.0) -> None:
        """Ends the thread, and what is open with an EngineStopped."""
        self._draining = True
        self._end_all(EngineStopped("the server is shutting down"))
        self._stopping = True
        self._tell(lambda: None)
        await asyncio.to_thread(self._thread.join, seconds)

    def _end_all(self, error: EngineStopped) -> None:
        """In the loop's thread."""
        self._failure = self._failure or error
        for stream in self._open:
            if not stream.ended:
                stream.ended = True
                stream._queue.put_nowait(error)
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
            self.limits = self._engine.limits
            self.stats = self._engine.stats()
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

    def _submit(
        self, requests: tuple[Request, ...], streams: list[Stream], done: asyncio.Future[None]
    ) -> None:
        try:
            for request, stream in zip(requests, streams, strict=True):
                stream.id = self._engine.submit(request)
                self._streams[stream.id] = stream
        except ValueError as error:
            self._cancel(streams)
            self._to_loop(_settle, done, error)
        else:
            self._to_loop(_settle, done, None)

    def _cancel(self, streams: list[Stream]) -> None:
        for stream in streams:
            if self._streams.pop(stream.id, None) is not None:
                self._engine.cancel(stream.id)

    def _deliver(self, events: list[Event]) -> None:
        found = [
            (self._streams[event.request], event)
            for event in events
            if event.request in self._streams  # else cancelled meanwhile
        ]
        for stream, event in found:
            if event.finish_reason is not None:
                del self._streams[stream.id]
        if found:
            self._to_loop(_hand_over, found)

    def _to_loop(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(function, *arguments)


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if not future.done():
        future.set_exception(error) if error else future.set_result(None)


def _hand_over(found: list[tuple[Stream, Event]]) -> None:
    for stream, event in found:
        stream.ended = stream.ended or event.finish_reason is not None
        stream._queue.put_nowait(event)
