"""A line of JSON for every step of an engine, and the same for a trace viewer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_ext.serve.engine import Engine

_MICRO = 1e6


class Trace:
    """Writes what each step ran.

    Args:
        file: takes text. Lines hold tick, stage (block, coda, score, offload, restore; "tick" where
            the device routes, whose loops the host does not know), rows, for a block its rows by
            loop and by kind, the lengths of the queues before it, and begin and duration in
            microseconds.
    """

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self._start: float | None = None
        self._ticks = 0

    def step(
        self, engine: Engine, stage: str, n: int, begin: float, run: Callable[[], list]
    ) -> list:
        if self._start is None:
            self._start = begin
        self._ticks += 1
        line: dict[str, Any] = {"tick": self._ticks, "stage": stage, "rows": n}
        if stage == "block":
            segments = engine._tensors["seg_offsets"].tolist()
            line["loops"] = [b - a for a, b in itertools.pairwise(segments)]
            kinds = engine._tensors["kind"][:n].tolist()
            line["kinds"] = {
                name: kinds.count(i) for i, name in enumerate(("current", "fill", "prompt"))
            }
        line["queues"] = engine.scheduler.queues()
        events = run()
        line["t_us"] = round((begin - self._start) * _MICRO, 1)
        line["took_us"] = round((engine.clock() - begin) * _MICRO, 1)
        if stage != "idle":
            self.file.write(json.dumps(line) + "\n")
        return events


def chrome(lines: Iterable[str]) -> dict[str, Any]:
    """The trace as chrome://tracing and Perfetto read it: a track per stage, queues as counters."""
    events: list[dict[str, Any]] = []
    stages: dict[str, int] = {}
    for text in lines:
        line = json.loads(text)
        track = stages.setdefault(line["stage"], len(stages))
        detail = {key: line[key] for key in ("tick", "rows", "loops", "kinds") if key in line}
        place = {"pid": 0, "ts": line["t_us"]}
        name = f"{line['stage']} {line['rows']}"
        events.append(
            {**place, "name": name, "ph": "X", "tid": track, "dur": line["took_us"], "args": detail}
        )
        events.append({**place, "name": "queues", "ph": "C", "args": line["queues"]})
    for stage, track in stages.items():
        name = {"name": "thread_name", "ph": "M", "pid": 0, "tid": track, "args": {"name": stage}}
        events.append(name)
    return {"traceEvents": events}


def to_chrome(trace: Path, out: Path) -> None:
    """Converts a file of lines."""
    with trace.open() as lines:
        document = chrome(lines)
    beside = out.with_name(f".{out.name}.part")
    beside.write_text(json.dumps(document))
    beside.replace(out)
