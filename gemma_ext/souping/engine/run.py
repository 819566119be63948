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
from gemma_ext.progress import Moved
from gemma_ext.souping.engine.files.disk import Disk, is_over, wait
from gemma_ext.souping.engine.files.journal import Done, Journal
from gemma_ext.souping.engine.files.ring import Ring
from gemma_ext.souping.engine.files.shards import Shard
from gemma_ext.souping.engine.loads import MERGE, EndOfSurvey, Load, cut
from gemma_ext.souping.engine.plan import Target
from gemma_ext.souping.method import Method

AHEAD = 8  # loads of the largest kind in memory; more would only fault in more pages
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
        progress: Moved,
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
        self.groups: deque[list[Load | EndOfSurvey]] = deque()
        self.total = self.moved = 0
        self.stopped = False

    def go(self, threads: int, chunk_bytes: int, memory_bytes: int) -> None:
        with Disk(threads) as disk:
            self._verify(disk)
        groups = cut(self.targets, self.method, self.journal.done, chunk_bytes, memory_bytes)
        self.groups.extend(sorted(groups, key=lambda group: -sum(load.nbytes for load in group)))
        loads = [load for group in groups for load in group]
        self.total = sum(load.nbytes for load in loads)
        if any(isinstance(load, EndOfSurvey) for load in loads):
            for target in self.targets:
                self.state(target)
        most = max((load.memory_bytes for load in loads), default=0)
        cores = torch.get_num_threads()
        lanes = max(1, min(LANES, cores, len(groups))) if LANES * most <= memory_bytes else 1
        room = max(most, min(memory_bytes // LANES, AHEAD * most))
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
    """Works on one group of loads after another: reads ahead, merges, writes behind."""

    def __init__(self, run: Run, disk: Disk, ring: Ring) -> None:
        self.run, self.method = run, run.method
        self.disk, self.ring = disk, ring
        self.waiting: deque[Load | EndOfSurvey] = deque()
        self.digests: dict[str, int] = {}

    def go(self) -> None:
        reading, writing = deque(), deque()
        while not self.run.stopped and (self._refill() or reading or writing):
            while self._refill() and self._request(self.waiting[0]):
                reading.append(self.waiting.popleft())
            if reading:
                load = reading.popleft()
                self._process(load)
                writing.append(load)
            while writing and (not reading or is_over(writing[0].asked)):
                load = writing.popleft()
                self._retire(load)
                self.run.advance(load.nbytes)
                if not reading:
                    break  # there is room to read into

    def _refill(self) -> bool:
        """Whether there is something to read."""
        if not self.waiting:
            with suppress(IndexError):
                self.waiting.extend(self.run.groups.popleft())
        return bool(self.waiting)

    def _request(self, load: Load | EndOfSurvey) -> bool:
        """Asks for a load's bytes if there is memory for them."""
        if isinstance(load, EndOfSurvey) or self._is_skipped(load):
            return True
        if load.is_copy:
            path, entry = self.run.places[load.target.info.name]
            self.disk.copy(load.target.sources[0].stored, path, entry.offset)
            load.asked = self.disk.asked()
            return True
        load.memory = self.ring.take(load.memory_bytes)
        if load.memory is None:
            return False
        for source, staged in zip(load.target.inputs, load.regions()[0], strict=True):
            source.request(self.disk, load.start, load.stop, staged)
        load.asked = self.disk.asked()
        return True

    def _is_skipped(self, load: Load) -> bool:
        """Whether the method wants nothing of a survey nor of those before it, which may still be
        under way."""
        if load.target.values is None or load.passes[-1] == MERGE:
            return False
        state = self.run.state(load.target)
        return all(self.method.skips(step, state) for step in range(load.passes[-1] + 1))

    def _process(self, load: Load | EndOfSurvey) -> None:
        """Surveys, merges and begins to write what has been read."""
        if isinstance(load, EndOfSurvey):
            self.method.settle_model(load.step, self.run.states)
        if load.memory is None:
            return
        wait(load.asked)
        target, (staged, written) = load.target, load.regions()
        if target.values is None:
            _convert(load, staged[0], written)
        else:
            self._apply(load, staged, written.view(target.dtype))
        if load.written:
            path, entry = self.run.places[target.info.name]
            at = load.start * target.dtype.itemsize
            self.disk.write(path, entry.offset + at, written, seed=at)
        load.asked = self.disk.asked()

    def _apply(self, load: Load, staged: Sequence[Tensor], result: Tensor) -> None:
        target, state = load.target, self.run.state(load.target)
        inputs = [
            self._shaped(source.deliver(load.start, load.stop, bytes_), target)
            for source, bytes_ in zip(target.inputs, staged, strict=True)
        ]
        sources = inputs[: len(target.sources)]
        base = inputs[-1] if target.base else None
        for step in load.passes:
            if step == MERGE:
                out = result.view(sources[0].shape)
                if self.run.device.type != "cpu":
                    out = torch.empty_like(out, device=self.run.device)
                part = Part(sources, base, out, target.info.name, load.start)
                self.method.merge(part, state)
                if out.device != result.device:
                    result.copy_(out.view(-1))
            else:
                part = Part(sources, base, None, target.info.name, load.start)
                self.method.survey(step, part, state)
                if load.is_last:
                    self.method.settle(step, state)

    def _shaped(self, values: Tensor, target: Target) -> Tensor:
        """On the device, in the shape that the method's grain promises."""
        values = values.to(self.run.device, non_blocking=True)
        shape = target.info.shape
        if self.method.grain == "tensor":
            return values.view(shape)
        if self.method.grain == "row" and shape:
            return values.view(-1, shape[-1])
        return values

    def _retire(self, load: Load | EndOfSurvey) -> None:
        """Waits for a load's writes, and notes a tensor that is done."""
        digest = wait(load.asked)
        if load.memory is None:
            return  # a copy is cheap to do again, and nobody has read it to know its digest
        self.ring.give_back()
        if MERGE not in load.passes:
            return
        name = load.target.info.name
        total = (self.digests.pop(name, 0) + digest) % 2**64
        if load.is_last:
            self.run.finished(load.target, load.size, total)
        else:
            self.digests[name] = total


def _convert(load: Load, staged: Tensor, written: Tensor) -> None:
    source, dtype = load.target.sources[0], load.target.dtype
    if source.is_plain and source.stored.dtype == dtype:
        written.copy_(staged)
    else:
        written.view(dtype).copy_(source.deliver(load.start, load.stop, staged))
