"""What a merge reads, piece by piece, and what is done to each piece."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gemma_ext.souping.engine.files.ring import PAGE, padded
from gemma_ext.souping.engine.plan import Target
from gemma_ext.souping.method import Method

MERGE = -1  # the pass that writes; surveys are 0, 1, ...


@dataclass
class Load:
    """Elements [start, stop) of a target, to be read and worked on.

    Attributes:
        target: of which tensor.
        start, stop: which of its elements, flat.
        size: elements of every piece of the target but the last.
        final: the last pass over them, after which they go.
        again: whether they will be read once more for a later pass.
        staged: bytes that each input needs.
        written: bytes of the result.
        memory: what holds them; None where nothing is read.
        asked: transfers to wait for.
    """

    target: Target
    start: int
    stop: int
    size: int
    final: int = MERGE
    again: bool = False
    staged: Sequence[int] = ()
    written: int = 0
    memory: Tensor | None = None
    asked: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.staged = [s.staged_bytes(self.start, self.stop) for s in self.target.inputs]
        if self.final == MERGE:
            self.written = (self.stop - self.start) * self.target.dtype.itemsize

    @property
    def is_last(self) -> bool:
        return self.stop == self.target.info.numel

    @property
    def nbytes(self) -> int:
        """Moved from and to files."""
        return sum(self.staged) + self.written

    @property
    def memory_bytes(self) -> int:
        return 0 if self.target.is_copy else sum(map(_room, (*self.staged, self.written)))

    def inputs(self) -> list[Tensor]:
        """The memory of each input, as far from a page's start as in its file."""
        regions, at = [], 0
        for source, size in zip(self.target.inputs, self.staged, strict=True):
            begin = at + source.place(self.start)
            regions.append(self.memory[begin : begin + size])
            at += _room(size)
        return regions

    def result(self, offset: int) -> Tensor:
        """The memory of what goes to a file's byte `offset`, likewise."""
        begin = sum(map(_room, self.staged)) + offset % PAGE
        return self.memory[begin : begin + self.written]


def _room(nbytes: int) -> int:
    """Whole pages for a run of bytes, wherever in the first one it begins."""
    return padded(nbytes + PAGE)


@dataclass(frozen=True)
class Task:
    """One pass over one load; without a load the end of a model-wide survey."""

    step: int
    load: Load | None = None


def cut(
    targets: Sequence[Target],
    method: Method,
    done: Collection[str],
    chunk_bytes: int,
    memory_bytes: int,
) -> list[list[Task]]:
    """Tasks of all targets but those that are done, in groups that must keep their order."""
    filled = [target for target in targets if target.info.numel]
    left = [target for target in filled if target.info.name not in done]
    merges = [_tasks(target, method, chunk_bytes, memory_bytes) for target in left]
    if not method.model_wide or all(target.values is None for target in left):
        return merges
    group: list[Task] = []
    for step in range(method.surveys):
        for target in filled:
            if target.values is not None:
                pieces = _pieces(target, method, chunk_bytes, step, again=True)
                group += [Task(step, load) for load in pieces]
        group.append(Task(step))
    return [group + [task for tasks in merges for task in tasks]]


def held_bytes(group: Sequence[Task]) -> int:
    """The most memory that a group holds at once: loads whose first and last pass differ, or one;
    and another for what a ring loses at its end."""
    sizes = {id(task.load): task.load.memory_bytes for task in group if task.load}
    kept = {id(task.load) for task in group if task.load and task.step != task.load.final}
    return sum(sizes[key] for key in kept) + max(sizes.values(), default=0)


def _tasks(target: Target, method: Method, chunk_bytes: int, memory_bytes: int) -> list[Task]:
    """Everything that is done to a tensor. If it has to be seen several times it is read once
    where `memory_bytes` hold it, else anew for every pass."""
    steps = [MERGE]
    if target.values is not None and method.surveys and not method.model_wide:
        state = method.begin(target.info, target.values)  # only asked what it skips
        steps = [*(s for s in range(method.surveys) if not method.skips(s, state)), MERGE]
    if target.is_copy:
        return [Task(MERGE, Load(target, 0, target.info.numel, target.info.numel))]
    pieces = _pieces(target, method, chunk_bytes)
    tasks = [Task(step, load) for step in steps for load in pieces]
    if len(steps) == 1 or held_bytes(tasks) <= memory_bytes:
        return tasks
    return [
        Task(step, load)
        for step in steps
        for load in _pieces(target, method, chunk_bytes, step, again=step != MERGE)
    ]


def _pieces(
    target: Target, method: Method, chunk_bytes: int, final: int = MERGE, again: bool = False
) -> list[Load]:
    """A tensor, chunk by chunk."""
    numel, size = target.info.numel, _size(target, method, chunk_bytes)
    return [
        Load(target, start, min(start + size, numel), size, final, again)
        for start in range(0, numel, size)
    ]


def _size(target: Target, method: Method, chunk_bytes: int) -> int:
    """Elements of a piece: as many as a chunk holds of what must not be cut."""
    shape = target.info.shape
    grain = [source.row for source in target.inputs if not source.is_plain]
    if target.values is not None and method.grain == "tensor":
        return target.info.numel
    if target.values is not None and method.grain == "row":
        grain.append(shape[-1] if shape else 1)
    itemsize = max(target.dtype.itemsize, *(s.stored.dtype.itemsize for s in target.inputs))
    width = math.lcm(*grain)
    return max(1, chunk_bytes // itemsize // width) * width
