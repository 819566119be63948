"""Runs of the block from buffers that never move, so that a card can replay them.

Rows are filled up to a power of two with rows of no slot and no request, which the ops pass over;
bounds of segments are read on the device. So one graph serves every mix of loops of its size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_ext.serve.step import Part, Rows, Step

if TYPE_CHECKING:
    from gemma_ext.serve.runner import ModelRunner

_LEAST = 8  # rows; smaller runs cost as much


class Recorder:
    """Captures runs on a card. Its graphs are replayed one after the other and share memory.

    Streams are the device's own: those of torch's defaults are of the thread's current card.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self._pool: Any = None

    def warm(self, run: Callable[[], object]) -> None:
        """Runs it as it is: a first launch brings what no graph can hold."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            run()
        current.wait_stream(self.stream)

    def capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
            run()
        self._pool = graph.pool()
        return graph


class Graphs:
    """Runs of the block by number of rows; captured on a card, run as they are on a CPU.

    Args:
        runner: of the model.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.sizes: dict[int, _Sized] = {}
        self.tables: Tensor | None = None
        device = runner.bank.device
        self.recorder = Recorder(device) if device.type == "cuda" else None

    def run(self, rows: Rows) -> Tensor | None:
        """Runs the rows; the states [n, D] that the exit test compares with, if it does."""
        n = len(rows.slot)
        size = max(_LEAST, 1 << (n - 1).bit_length())
        if self.tables is None:
            self.tables = torch.empty_like(rows.block_tables, device=self.runner.bank.device)
        self.tables.copy_(rows.block_tables)
        if size not in self.sizes:
            self.sizes[size] = _Sized(self, size)
        before = self.sizes[size].run(rows)
        return None if before is None else before[:n]


class _Sized:
    """The buffers, and on a card the graph, of one number of rows."""

    def __init__(self, graphs: Graphs, size: int) -> None:
        self.runner, self.size, self.tables = graphs.runner, size, graphs.tables
        device = self.runner.bank.device
        self.host = torch.zeros(5 * size + self.runner.loops + 1, dtype=torch.int32)
        self.device = self.host.to(device, copy=True)
        self.part = Part(*self.device[: 5 * size].view(5, size), self.device[5 * size :])
        self.graph: torch.cuda.CUDAGraph | None = None
        self.before: Tensor | None = None
        if graphs.recorder is not None:  # of rows that are none, so that it changes nothing
            self._load(None)
            graphs.recorder.warm(self._run)
            self.graph = graphs.recorder.capture(self._run)

    def run(self, rows: Rows) -> Tensor | None:
        self._load(rows)
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        return self.before

    def _load(self, rows: Rows | None) -> None:
        """The rows, and behind them rows that are none."""
        size, host = self.size, self.host
        columns = host[: 5 * size].view(5, size)
        n = 0 if rows is None else len(rows.slot)
        columns[0, n:] = columns[2, n:] = -1
        columns[1, n:] = columns[4, n:] = 0
        columns[3, n:] = self.runner.loops - 1
        if rows is not None:
            mine = (rows.slot, rows.pos, rows.req, rows.loop, self.runner.places(rows))
            for column, values in zip(columns, mine, strict=True):
                column[:n] = values
            host[5 * size :] = rows.seg_offsets
        self.device.copy_(host)

    def _run(self) -> None:
        slots = None
        if self.runner.exits.wants_before:
            slots = self.part.slot.clamp(min=0).long()
        step = Step(self.runner, self.part, self.tables, slots)
        step.run()
        self.before = step.before
