"""The run of a streamed merge: reads ahead, surveys, merges, writes behind."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.ops.souping.parts import Part
from gemma_ext.souping.engine.files.disk import Disk, is_over, wait
from gemma_ext.souping.engine.files.journal import Done, Journal
from gemma_ext.souping.engine.files.ring import Ring
from gemma_ext.souping.engine.files.shards import Shard
from gemma_ext.souping.engine.loads import MERGE, Load, Task, cut, held_bytes
from gemma_ext.souping.engine.plan import Target
from gemma_ext.souping.engine.progress import Progress
from gemma_ext.souping.method import Method

AHEAD = 3  # pieces that are read or written while another is merged
LANES = 2  # a lane that waits for the disk leaves the processor to the other


class Run:
    """One run over the targets that are not done yet.

    Tensors are dealt out to lanes, each with memory and transfers of its own and one thread that
    merges: threads that share a tensor would wait for each other at every step, and for whatever
    else runs on the machine.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        method: Method,
        folder: Path,
        shards: Sequence[Shard],
        journal: Journal,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.targets, self.method = targets, method
        self.journal, self.device, self.progress = journal, device, progress
        self.places = {
            name: (folder / shard.name, entry)
            for shard in shards
            for name, entry in shard.tensors.items()
        }
        self.states: dict[str, Any] = {}
        self.lock = threading.Lock()  # of what lanes share
        self.groups: deque[list[Task]] = deque()
        self.total = self.moved = 0
        self.stopped = False

    def go(self, threads: int, chunk_bytes: int, memory_bytes: int) -> None:
        with Disk(threads) as disk:
            self._verify(disk)
        share = memory_bytes // LANES
        groups = cut(self.targets, self.method, self.journal.done, chunk_bytes, share)
        self.groups.extend(sorted(groups, key=lambda group: -_nbytes(group)))
        self.total = sum(map(_nbytes, groups))
        tasks = [task for group in groups for task in group]
        if any(task.load is None for task in tasks):
            for target in self.targets:
                self.state(target)
        piece = max((task.load.memory_bytes for task in tasks if task.load), default=0)
        held = max(map(held_bytes, groups), default=0)
        cores = torch.get_num_threads()
        lanes = max(1, min(LANES, cores, len(groups))) if held <= share else 1
        room = max(held, min(share, held + AHEAD * piece))
        try:
            self._spread(lanes, lambda: self._work(threads, room, cores // lanes))
        finally:
            torch.set_num_threads(cores)  # that of a lane is in part the process's

    def _spread(self, lanes: int, work: Callable[[], None]) -> None:
        """Runs lanes side by side; an error or interrupt ends all of them."""
        with ThreadPoolExecutor(lanes) as pool:
            try:
                for lane in as_completed([pool.submit(work) for _ in range(lanes)]):
                    lane.result()
            finally:
                self.stopped = True

    def _work(self, threads: int, room: int, cores: int) -> None:
        torch.set_num_threads(cores)
        with Disk(threads) as disk:
            Lane(self, disk, Ring(room, pinned=self.device.type == "cuda")).go()

    def _verify(self, disk: Disk) -> None:
        """Forgets what the journal calls done and the disk does not hold."""
        for done in list(self.journal.done.values()):
            path, entry = self.places[done.name]
            for at in range(0, entry.nbytes, done.step):
                size = min(done.step, entry.nbytes - at)
                disk.check(path, entry.offset + at, size, seed=at)
            if wait(disk.asked()) != done.digest:
                self.journal.forget(done.name)

    def state(self, target: Target) -> Any:
        """Of the method for a tensor that is merged; begun at the first call."""
        name = target.info.name
        with self.lock:
            if name not in self.states and target.values is not None:
                self.states[name] = self.method.begin(target.info, target.values)
            return self.states.get(name)

    def finished(self, target: Target, size: int, digest: int) -> None:
        """Notes a tensor that is written, in pieces of `size` elements."""
        with self.lock:
            self.states.pop(target.info.name, None)
            self.journal.add(Done(target.info.name, size * target.dtype.itemsize, digest))

    def advance(self, nbytes: int) -> None:
        with self.lock:
            self.moved += nbytes
            self.progress(self.moved, self.total)


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
        part = Part(sources, base, None, target.info.name, load.start)
        self.method.survey(step, part, state)
        if load.is_last:
            self.method.settle(step, state)

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


def _nbytes(group: Sequence[Task]) -> int:
    return sum(task.load.nbytes for task in group if task.load and task.step == task.load.final)


def _convert(load: Load, written: Tensor) -> None:
    (source,), (staged,), dtype = load.target.sources, load.inputs(), load.target.dtype
    if source.is_plain and source.stored.dtype == dtype:
        written.copy_(staged)
    else:
        written.view(dtype).copy_(source.deliver(load.start, load.stop, staged))
