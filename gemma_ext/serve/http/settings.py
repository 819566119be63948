"""What a server lets its clients do."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Bounds of requests.

    Attributes:
        api_keys: one of them has to come as bearer token; none lets everybody in.
        most_body: bytes of a request's body.
        most_choices: of one request, prompts times choices of each.
        most_tokens: of one output; None leaves the bound to the context.
        most_connections: of clients; more get a 503 without a look at what they want.
        body_seconds: that a body may take to arrive.
        request_seconds: that an answer may take in all; None for no end.
        write_seconds: that a client may go without reading any of an answer that waits for it.
        drain_seconds: that open requests have to end when the server is told to.
    """

    api_keys: tuple[str, ...] = ()
    most_body: int = 4 * 2**20
    most_choices: int = 128
    most_tokens: int | None = None
    most_connections: int = 1024
    body_seconds: float = 30.0
    request_seconds: float | None = 600.0
    write_seconds: float = 60.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "api_keys" and value is not None and not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        if not math.isfinite(self.drain_seconds):
            raise ValueError(f"drain_seconds: expected a finite number, got {self.drain_seconds}")
        if not all(self.api_keys):
            raise ValueError("api_keys: expected keys that are not empty")
