"""The server process: uvicorn, and an end that leaves no request unanswered."""

from __future__ import annotations

import asyncio
import math
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemma_ext.serve.http.generation import Service

_MARGIN = 5.0  # seconds between the last answers and the end of their connections
_IDLE_SECONDS = 30  # of a connection between two requests
_HEAD_SECONDS = 15.0  # that a client may take to say what it wants


class _Patient(H11Protocol):
    """HTTP/1.1 that closes a connection whose first request does not come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(_HEAD_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.close()


class Server(uvicorn.Server):
    """Serves one app. Told to end, by SIGTERM or `should_exit`, it takes no connection any more,
    gives open requests `drain_seconds`, and answers with a 503 what is open then.

    Args:
        app: of `build_app`.
        host, port: to listen at; port 0 takes a free one.
        log_level: of uvicorn.
    """

    def __init__(
        self, app: FastAPI, host: str = "127.0.0.1", port: int = 8000, log_level: str = "info"
    ) -> None:
        self._service: Service = app.state.service
        settings = self._service.settings
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=_Patient,
                log_level=log_level,
                limit_concurrency=settings.most_connections,
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
