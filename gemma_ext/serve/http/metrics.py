"""What a server did, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from gemma_ext.serve.async_engine import AsyncEngine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKENS = tuple(2**power for power in range(0, 18, 2))
_GAUGES = {
    "waiting": "Requests without pages of the KV pool.",
    "running": "Requests with pages of the KV pool.",
    "pages": "Pages of the KV pool.",
    "free_pages": "Pages of the KV pool that nobody holds.",
}
_COUNTERS = {
    "steps": "Launches of a block.",
    "rows": "Rows in launches of a block.",
    "prompt_tokens": "Tokens of prompts that were computed.",
    "output_tokens": "Tokens that were drawn.",
    "cached_tokens": "Tokens of prompts that the prefix cache had.",
    "fill_rows": "Rows that only filled the KV of tokens that had left earlier.",
    "preemptions": "Requests whose pages were taken away for a time.",
}


class Metrics:
    """Counters of one server; `text` adds the engine's own."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        ProcessCollector(registry=self.registry)
        self.answers = Counter(
            "gemma_ext_answers",
            "Answers by route and HTTP status; 499 is a client that left.",
            ("route", "status"),
            registry=self.registry,
        )
        self.answer_seconds = self._histogram("answer_seconds", "From request to end of answer.")
        self.first_token_seconds = self._histogram(
            "first_token_seconds", "From submission to first token."
        )
        self.between_tokens_seconds = self._histogram(
            "between_tokens_seconds", "Between two tokens of a request."
        )
        self.prompt_length = self._histogram("prompt_length", "Tokens of a prompt.", _TOKENS)
        self.output_length = self._histogram("output_length", "Tokens of an output.", _TOKENS)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"gemma_ext_{name}", what, buckets=buckets, registry=self.registry)


class _EngineCollector:
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        up = float(self._engine.trouble is None)
        yield GaugeMetricFamily("gemma_ext_up", "Whether requests are answered.", up)
        yield GaugeMetricFamily("gemma_ext_open", "Requests not ended.", self._engine.open)
        for name, what in _GAUGES.items():
            yield GaugeMetricFamily(f"gemma_ext_{name}", what, getattr(stats, name))
        for name, what in _COUNTERS.items():
            yield CounterMetricFamily(f"gemma_ext_{name}", what, getattr(stats, name))
        exits = CounterMetricFamily(
            "gemma_ext_exits", "Tokens read after so many loops.", labels=("depth",)
        )
        for place, count in enumerate(stats.exits):
            exits.add_metric((str(place + 1),), count)
        yield exits
