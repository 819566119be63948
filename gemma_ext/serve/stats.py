"""How long requests and tokens took."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

LATEST = 2**18  # values that are kept, 8 MB of each kind


@dataclass
class _Open:
    submitted: float
    last: float = 0.0
    tokens: int = 0


def _latest() -> deque[float]:
    return deque(maxlen=LATEST)


@dataclass
class Latencies:
    """Times of the latest requests and tokens, in seconds of the engine's clock.

    Attributes:
        to_first: of each request, from its submission to its first token.
        between: of each token but the first of a request, since the one before it.
        per_token: of each finished request, (last token - submission) / tokens.
    """

    to_first: deque[float] = field(default_factory=_latest)
    between: deque[float] = field(default_factory=_latest)
    per_token: deque[float] = field(default_factory=_latest)
    _open: dict[int, _Open] = field(default_factory=dict)

    def submitted(self, id: int, now: float) -> None:
        self._open[id] = _Open(now)

    def token(self, id: int, now: float) -> None:
        entry = self._open[id]
        if entry.tokens:
            self.between.append(now - entry.last)
        else:
            self.to_first.append(now - entry.submitted)
        entry.last = now
        entry.tokens += 1

    def finished(self, id: int) -> None:
        entry = self._open.pop(id)
        if entry.tokens:
            self.per_token.append((entry.last - entry.submitted) / entry.tokens)

    def dropped(self, id: int) -> None:
        self._open.pop(id, None)

    def forget(self) -> None:
        """Drops what was measured; requests stay open."""
        for values in (self.to_first, self.between, self.per_token):
            values.clear()

    def summary(self) -> dict[str, float]:
        """Quantiles in seconds; NaN where nothing was measured."""
        found = {}
        for name, values in (
            ("ttft", self.to_first),
            ("tpot", self.between),
            ("norm_latency", self.per_token),
        ):
            for q in (50, 99):
                found[f"{name}_p{q}"] = float(np.percentile(values, q)) if values else float("nan")
        return found
