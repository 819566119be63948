"""What stands before every route: keys, and a count of who got which answer."""

from __future__ import annotations

import hashlib
import hmac
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_ext.serve.http.errors import CLIENT_LEFT, ApiError
from gemma_ext.serve.http.metrics import Metrics

OPEN = ("/health", "/metrics")  # need no key: probes and scrapers have none


class Gate:
    """ASGI middleware.

    Args:
        app: behind it.
        metrics: that are kept.
        keys: of which one has to come as bearer token; none lets everybody in.
        routes: paths that are counted under their own name.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, keys: tuple[str, ...], routes: frozenset[str]
    ) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # the server leaves out the body
            scope = {**scope, "method": "GET"}
        began, status = time.monotonic(), CLIENT_LEFT

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._keys and scope["path"] not in OPEN and not self._knows(scope):
                refusal = ApiError(401, "expected a valid API key", code="invalid_api_key")
                await refusal.response()(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        except Exception:
            if status == CLIENT_LEFT:  # no answer began; the 500 is given in front of this
                status = 500
            raise
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.answers.labels(route, str(status)).inc()
            self._metrics.answer_seconds.observe(time.monotonic() - began)

    def _knows(self, scope: Scope) -> bool:
        given = next((v for name, v in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        digest = _digest(token.strip())
        # all are compared, in a time that does not depend on how much is right
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
