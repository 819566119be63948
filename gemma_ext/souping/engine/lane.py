"""One lane of a streamed merge: reads ahead, surveys, merges, writes behind."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.ops.souping.parts import Part
from gemma_ext.souping.engine.files.disk import Disk, is_over, wait
from gemma_ext.souping.engine.files.ring import Ring
from gemma_ext.souping.engine.loads import MERGE, Load, Task
from gemma_ext.souping.engine.plan import Target

if TYPE_CHECKING:
    from gemma_ext.souping.engine.run import Run

AHEAD = 3  # pieces that are read or written while another is merged


class Copies:
    """Copies to a card, which still read the memory of what they copy; a transfer as `wait` takes
    them."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(device))

    def done(self) -> bool:
        return self._event.query()

    def wait(self) -> int:
        self._event.synchronize()
        return 0


class Lane:
    """Works on one group of tasks after another: reads ahead, merges, writes behind."""

    def __init__(self, run: Run, disk: Disk, ring: Ring) -> None:
        self.run, self.method = run, run.method
        self.disk, self.ring = disk, ring
        self.waiting: deque[Task] = deque()
        self.ready: deque[Task] = deque()
        self.writing: deque[Load] = deque()
        self.digests: dict[str, int] = {}

    def go(self) -> None:
        while not self.run.stopped:
            while self.writing and is_over(self.writing[0].asked):
                self._retire(self.writing.popleft())
            while self._refill() and self._request(self.waiting[0]):
                self.ready.append(self.waiting.popleft())
            if self.ready:
                self._process(self.ready.popleft())
            elif self.writing:
                self._retire(self.writing.popleft())
            else:
                return

    def _refill(self) -> bool:
        """Whether there is something to read."""
        if not self.waiting:
            with suppress(IndexError):
                self.waiting.extend(self.run.groups.popleft())
        return bool(self.waiting)

    def _request(self, task: Task) -> bool:
        """Asks for a load's bytes if it has not got them and there is memory for them."""
        load = task.load
        if load is None or load.memory is not None or self._is_skipped(load):
            return True
        if load.target.is_copy:
            path, entry = self.run.places[load.target.info.name]
            self.disk.copy(load.target.sources[0].stored, path, entry.offset)
            load.asked = self.disk.asked()
            return True
        load.memory = self.ring.take(load.memory_bytes)
        if load.memory is None:
            return False
        for source, staged in zip(load.target.inputs, load.inputs(), strict=True):
            source.request(self.disk, load.start, load.stop, staged, direct=not load.again)
        load.asked = self.disk.asked()
        return True

    def _is_skipped(self, load: Load) -> bool:
        """Whether the method wants nothing of a survey nor of those before it, which may still be
        under way."""
        if load.target.values is None or load.final == MERGE:
            return False
        state = self.run.state(load.target)
        return all(self.method.skips(step, state) for step in range(load.final + 1))

    def _process(self, task: Task) -> None:
        """Surveys, or merges and begins to write, what has been read."""
        load = task.load
        if load is None:
            self.method.settle_model(task.step, self.run.states)
            return
        if load.memory is not None:
            wait(load.asked)
            load.asked = []
            if task.step == MERGE:
                self._merge(load)
            else:
                self._survey(task.step, load)
        if task.step == load.final:
            self.writing.append(load)

    def _survey(self, step: int, load: Load) -> None:
        target, state = load.target, self.run.state(load.target)
        sources, base = self._deliver(load)
        load.asked = self._copies(load)
        part = Part(sources, base, None, target.info.name, load.start)
        self.method.survey(step, part, state)
        if load.is_last:
            self.method.settle(step, state)

    def _copies(self, load: Load) -> list:
        """What still reads the memory of a survey; a merge waits for its result, and so for it."""
        if self.run.device.type == "cpu":
            return []
        return [(Copies(self.run.device), load.target.info.name)]

    def _merge(self, load: Load) -> None:
        target = load.target
        path, entry = self.run.places[target.info.name]
        at = load.start * target.dtype.itemsize
        written = load.result(entry.offset + at)
        if target.values is None:
            _convert(load, written)
        else:
            sources, base = self._deliver(load)
            result = written.view(target.dtype).view(sources[0].shape)
            out = result
            if self.run.device.type != "cpu":
                out = torch.empty_like(result, device=self.run.device)
            part = Part(sources, base, out, target.info.name, load.start)
            self.method.merge(part, self.run.state(target))
            if out is not result:
                result.copy_(out)
        self.disk.write(path, entry.offset + at, written, seed=at)
        load.asked = self.disk.asked()

    def _deliver(self, load: Load) -> tuple[list[Tensor], Tensor | None]:
        """The sources and the base, on the device."""
        target = load.target
        inputs = [
            self._shaped(source.deliver(load.start, load.stop, staged), target)
            for source, staged in zip(target.inputs, load.inputs(), strict=True)
        ]
        return inputs[: len(target.sources)], inputs[-1] if target.base else None

    def _shaped(self, values: Tensor, target: Target) -> Tensor:
        """On the device, in the shape that the method's grain promises."""
        values = values.to(self.run.device, non_blocking=True)
        shape = target.info.shape
        if self.method.grain == "tensor":
            return values.view(shape)
        if self.method.grain == "row" and shape:
            return values.view(-1, shape[-1])
        return values

    def _retire(self, load: Load) -> None:
        """Waits for a load's writes, and notes a tensor that is done."""
        digest = wait(load.asked)
        self.run.advance(load.nbytes)
        if load.memory is None:
            return  # a copy is cheap to do again, and nobody has read it to know its digest
        load.memory = None
        self.ring.give_back()
        if load.final != MERGE:
            return
        name = load.target.info.name
        total = (self.digests.pop(name, 0) + digest) % 2**64
        if load.is_last:
            self.run.finished(load.target, load.size, total)
        else:
            self.digests[name] = total


def _convert(load: Load, written: Tensor) -> None:
    (source,), (staged,), dtype = load.target.sources, load.inputs(), load.target.dtype
    if source.is_plain and source.stored.dtype == dtype:
        written.copy_(staged)
    else:
        written.view(dtype).copy_(source.deliver(load.start, load.stop, staged))
