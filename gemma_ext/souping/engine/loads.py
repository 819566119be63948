"""What a merge reads: pieces of tensors, each with what is done to it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from gemma_ext.souping.engine.files.ring import padded
from gemma_ext.souping.engine.plan import Target
from gemma_ext.souping.method import Method

MERGE = -1  # the pass that writes; surveys are 0, 1, ...


@dataclass
class Load:
    """Elements [start, stop) of a target, to be read and worked on.

    Attributes:
        target: of which tensor.
        start, stop: which of its elements, flat.
        passes: what is done to them, in order.
        size: elements of every piece of the target but the last.
        staged: bytes that each input needs.
        written: bytes of the result.
        memory: what holds them; None where nothing is read.
        asked: transfers to wait for.
    """

    target: Target
    start: int
    stop: int
    passes: Sequence[int]
    size: int
    staged: Sequence[int] = ()
    written: int = 0
    memory: Tensor | None = None
    asked: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.staged = [s.staged_bytes(self.start, self.stop) for s in self.target.inputs]
        if MERGE in self.passes:
            self.written = (self.stop - self.start) * self.target.dtype.itemsize

    @property
    def is_copy(self) -> bool:
        """Whether the file's bytes are the result, so that they never come here."""
        (source, *more) = self.target.inputs
        return (
            self.target.values is None
            and not more
            and source.is_plain
            and source.stored.tensor is None
            and source.stored.dtype == self.target.dtype
        )

    @property
    def is_last(self) -> bool:
        return self.stop == self.target.info.numel

    @property
    def nbytes(self) -> int:
        """Moved from and to files."""
        return sum(self.staged) + self.written

    @property
    def memory_bytes(self) -> int:
        return 0 if self.is_copy else sum(map(padded, self.staged)) + padded(self.written)

    def regions(self) -> tuple[list[Tensor], Tensor]:
        """The memory of each input, and of the result."""
        regions, at = [], 0
        for size in (*self.staged, self.written):
            regions.append(self.memory[at : at + size])
            at += padded(size)
        return regions[:-1], regions[-1]


@dataclass
class EndOfSurvey:
    """Stands after the loads of a model-wide survey."""

    step: int
    nbytes: ClassVar[int] = 0
    memory_bytes: ClassVar[int] = 0
    memory: ClassVar[None] = None
    asked: ClassVar[Sequence[Any]] = ()


def cut(
    targets: Sequence[Target],
    method: Method,
    done: Collection[str],
    chunk_bytes: int,
    memory_bytes: int,
) -> list[list[Load | EndOfSurvey]]:
    """Loads of all targets but those that are done, in groups that must keep their order."""
    filled = [target for target in targets if target.info.numel]
    left = [target for target in filled if target.info.name not in done]
    merges = [_loads(target, method, chunk_bytes, memory_bytes) for target in left]
    if not method.model_wide or all(target.values is None for target in left):
        return merges
    group: list[Load | EndOfSurvey] = []
    for step in range(method.surveys):
        for target in filled:
            if target.values is not None:
                group += _pieces(target, method, step, chunk_bytes)
        group.append(EndOfSurvey(step))
    return [group + [load for loads in merges for load in loads]]


def _loads(target: Target, method: Method, chunk_bytes: int, memory_bytes: int) -> list[Load]:
    """Everything that is done to a tensor, at once if it has to be seen several times and two of
    its like fit the memory."""
    passes = [MERGE]
    if target.values is not None and not method.model_wide:
        passes = [*range(method.surveys), MERGE]
    whole = Load(target, 0, target.info.numel, passes, target.info.numel)
    if whole.is_copy or (len(passes) > 1 and 2 * whole.memory_bytes <= memory_bytes):
        return [whole]
    return [load for step in passes for load in _pieces(target, method, step, chunk_bytes)]


def _pieces(target: Target, method: Method, step: int, chunk_bytes: int) -> list[Load]:
    """One pass over a tensor, chunk by chunk."""
    numel, size = target.info.numel, _size(target, method, chunk_bytes)
    return [
        Load(target, start, min(start + size, numel), [step], size)
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
