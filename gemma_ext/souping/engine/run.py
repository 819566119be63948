"""The run of a streamed merge: what is left to do, dealt out to lanes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from gemma_ext.souping.engine.files.disk import Disk, wait
from gemma_ext.souping.engine.files.journal import Done, Journal
from gemma_ext.souping.engine.files.ring import Ring
from gemma_ext.souping.engine.files.shards import Shard
from gemma_ext.souping.engine.lane import AHEAD, Lane
from gemma_ext.souping.engine.loads import Task, cut, held_bytes
from gemma_ext.souping.engine.plan import Target
from gemma_ext.souping.engine.progress import Progress
from gemma_ext.souping.method import Method

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


def _nbytes(group: Sequence[Task]) -> int:
    return sum(task.load.nbytes for task in group if task.load and task.step == task.load.final)
