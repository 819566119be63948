"""The server process: uvicorn, and an end that leaves no request unanswered."""

from __future__ import annotations

import asyncio
import math
import socket

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.config import LOG_LEVELS
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemma_ext.serve.http.errors import ApiError
from gemma_ext.serve.http.generation import Service
from gemma_ext.serve.http.settings import Settings

_MARGIN = 5.0  # seconds between the last answers and the end of their connections
_IDLE_SECONDS = 30  # of a connection between two requests
_HEAD_SECONDS = 15.0  # that a client may take to say what it wants, each time
_AHEAD = 2**16  # bytes that it may send behind a request without an answer, then nothing is read


class _Connection(H11Protocol):
    """HTTP/1.1 that ends with clients who do not ask or do not read, and refuses as the API does.

    A timer runs while a request is awaited whose first byte came, and one while an answer, whole
    or not, waits to be read.
    """

    _asking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._settings: Settings = self.config.app.state.service.settings
        transport.set_write_buffer_limits(high=0)  # the last bytes of an answer count, too
        if len(self.connections) > self._settings.most_connections:
            self.app = _full
        self._asking = self.loop.call_later(_HEAD_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._asking, self._reading):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.our_state in (h11.IDLE, h11.DONE):  # nothing is asked, or all is answered
            if self._asking is None:
                self._asking = self.loop.call_later(_HEAD_SECONDS, self.transport.close)
        elif self._asking is not None:
            self._asking.cancel()
            self._asking = None
        waits = self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= _AHEAD
        if waits and self.flow.read_paused:
            self.flow.resume_reading()  # else nobody would hear that the client leaves

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def _watch(self, before: float = math.inf) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread >= before:
            self.transport.abort()  # close() would wait for what nobody reads
        else:
            self._reading = self.loop.call_later(self._settings.write_seconds, self._watch, unread)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else the answer is given
            refusal = ApiError(400, f"the request is no HTTP/1.1: {msg}").response()
            headers = [*refusal.raw_headers, (b"connection", b"close")]
            head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=refusal.body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    message = "too many connections are open, try again later"
    refusal = ApiError(503, message, code="too_many_connections").response()
    refusal.headers["Connection"] = "close"
    await refusal(scope, receive, send)


class Server(uvicorn.Server):
    """Serves one app. Told to end, by SIGTERM or `should_exit`, it takes no connection any more,
    gives open requests `drain_seconds`, and answers with a 503 what is open then.

    Args:
        app: of `build_app`.
        host, port: to listen at; port 0 takes a free one.
        log_level: of uvicorn.

    Raises:
        ValueError: a level that uvicorn does not have.
    """

    def __init__(
        self, app: FastAPI, host: str = "127.0.0.1", port: int = 8000, log_level: str = "info"
    ) -> None:
        self._service: Service = app.state.service
        settings = self._service.settings
        if log_level.lower() not in LOG_LEVELS:
            raise ValueError(
                f"log_level: expected one of {', '.join(LOG_LEVELS)}, got {log_level!r}"
            )
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=_Connection,
                log_level=log_level,
                timeout_graceful_shutdown=math.ceil(settings.drain_seconds + _MARGIN),
                timeout_keep_alive=_IDLE_SECONDS,
                server_header=False,
            )
        )

    @property
    def port(self) -> int:
        """That it listens at, once started."""
        return self.servers[0].sockets[0].getsockname()[1]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.ensure_future(self._drain())
        await super().shutdown(sockets)
        await draining

    async def _drain(self) -> None:
        engine = self._service.engine
        if not await engine.drain(self._service.settings.drain_seconds):
            await engine.stop()
