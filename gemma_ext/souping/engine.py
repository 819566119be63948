"""The run of a streamed merge: reads ahead, surveys, merges, writes behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.ops.souping.parts import Part
from gemma_ext.souping.files.disk import Disk, is_over, wait
from gemma_ext.souping.files.journal import Done, Journal
from gemma_ext.souping.files.ring import Ring
from gemma_ext.souping.files.shards import Shard
from gemma_ext.souping.loads import MERGE, EndOfSurvey, Load, cut
from gemma_ext.souping.method import Method
from gemma_ext.souping.plan import Target
from gemma_ext.souping.progress import Progress

AHEAD = 8  # loads of the largest kind in memory; more would only fault in more pages


class Run:
    """One run over the targets that are not done yet."""

    def __init__(
        self,
        targets: Sequence[Target],
        method: Method,
        folder: Path,
        shards: Sequence[Shard],
        disk: Disk,
        journal: Journal,
        device: torch.device,
    ) -> None:
        self.targets, self.method = targets, method
        self.disk, self.journal, self.device = disk, journal, device
        self.places = {
            name: (folder / shard.name, entry)
            for shard in shards
            for name, entry in shard.tensors.items()
        }
        self.states: dict[str, Any] = {}
        self.digests: dict[str, int] = {}

    def go(self, chunk_bytes: int, memory_bytes: int, progress: Progress) -> None:
        self._verify()
        done = self.journal.done
        waiting = deque(cut(self.targets, self.method, done, chunk_bytes, memory_bytes))
        if any(isinstance(load, EndOfSurvey) for load in waiting):
            for target in self.targets:
                self._state(target)
        total, moved = sum(load.nbytes for load in waiting), 0
        most = max((load.memory_bytes for load in waiting), default=0)
        room = max(most, min(memory_bytes, AHEAD * most))
        ring = Ring(room, pinned=self.device.type == "cuda")
        reading, writing = deque(), deque()
        while waiting or reading or writing:
            while waiting and self._request(waiting[0], ring):
                reading.append(waiting.popleft())
            if reading:
                load = reading.popleft()
                self._process(load)
                writing.append(load)
            while writing and (not reading or is_over(writing[0].asked)):
                load = writing.popleft()
                self._retire(load, ring)
                moved += load.nbytes
                progress(moved, total)
                if not reading and waiting:
                    break  # there is room to read into

    def _verify(self) -> None:
        """Forgets what the journal calls done and the disk does not hold."""
        for done in list(self.journal.done.values()):
            path, entry = self.places[done.name]
            for at in range(0, entry.nbytes, done.step):
                size = min(done.step, entry.nbytes - at)
                self.disk.check(path, entry.offset + at, size, seed=at)
            if wait(self.disk.asked()) != done.digest:
                self.journal.forget(done.name)

    def _request(self, load: Load | EndOfSurvey, ring: Ring) -> bool:
        """Asks for a load's bytes if there is memory for them."""
        if isinstance(load, EndOfSurvey) or self._is_skipped(load):
            return True
        if load.is_copy:
            path, entry = self.places[load.target.info.name]
            self.disk.copy(load.target.sources[0].stored, path, entry.offset)
            load.asked = self.disk.asked()
            return True
        load.memory = ring.take(load.memory_bytes)
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
        state = self._state(load.target)
        return all(self.method.skips(step, state) for step in range(load.passes[-1] + 1))

    def _process(self, load: Load | EndOfSurvey) -> None:
        """Surveys, merges and begins to write what has been read."""
        if isinstance(load, EndOfSurvey):
            self.method.settle_model(load.step, self.states)
        if load.memory is None:
            return
        wait(load.asked)
        target, (staged, written) = load.target, load.regions()
        if target.values is None:
            _convert(load, staged[0], written)
        else:
            self._apply(load, staged, written.view(target.dtype))
        if load.written:
            path, entry = self.places[target.info.name]
            at = load.start * target.dtype.itemsize
            self.disk.write(path, entry.offset + at, written, seed=at)
        load.asked = self.disk.asked()

    def _apply(self, load: Load, staged: Sequence[Tensor], result: Tensor) -> None:
        target, state = load.target, self._state(load.target)
        inputs = [
            self._shaped(source.deliver(load.start, load.stop, bytes_), target)
            for source, bytes_ in zip(target.inputs, staged, strict=True)
        ]
        sources = inputs[: len(target.sources)]
        base = inputs[-1] if target.base else None
        for step in load.passes:
            if step == MERGE:
                out = result.view(sources[0].shape)
                if self.device.type != "cpu":
                    out = torch.empty_like(out, device=self.device)
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
        values = values.to(self.device, non_blocking=True)
        shape = target.info.shape
        if self.method.grain == "tensor":
            return values.view(shape)
        if self.method.grain == "row" and shape:
            return values.view(-1, shape[-1])
        return values

    def _state(self, target: Target) -> Any:
        name = target.info.name
        if name not in self.states and target.values is not None:
            self.states[name] = self.method.begin(target.info, target.values)
        return self.states.get(name)

    def _retire(self, load: Load | EndOfSurvey, ring: Ring) -> None:
        """Waits for a load's writes, and notes a tensor that is done."""
        digest = wait(load.asked)
        if load.memory is None:
            return  # a copy is cheap to do again, and nobody has read it to know its digest
        ring.give_back()
        if MERGE not in load.passes:
            return
        name = load.target.info.name
        total = (self.digests.pop(name, 0) + digest) % 2**64
        if load.is_last:
            self.states.pop(name, None)
            self.journal.add(Done(name, load.step * load.target.dtype.itemsize, total))
        else:
            self.digests[name] = total


def _convert(load: Load, staged: Tensor, written: Tensor) -> None:
    source, dtype = load.target.sources[0], load.target.dtype
    if source.is_plain and source.stored.dtype == dtype:
        written.copy_(staged)
    else:
        written.view(dtype).copy_(source.deliver(load.start, load.stop, staged))
