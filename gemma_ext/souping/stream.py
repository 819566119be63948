"""Merging checkpoints from disk to disk in bounded memory.

Chunks of M + 1 models are read ahead into one ring of memory, merged, and written behind to files
that were laid out before the first weight was read. What the method has to see more than once is
kept in the ring where it fits and read again where it does not. The output appears under its name
when it is whole; until then it is in `OUT.partial`, with a journal that a later run goes on from.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.ops.souping.parts import Part
from gemma_ext.souping.files import journal as journals
from gemma_ext.souping.files import shards as files
from gemma_ext.souping.files.checkpoint import open_checkpoint
from gemma_ext.souping.files.disk import Disk, is_over, wait
from gemma_ext.souping.files.ring import Ring
from gemma_ext.souping.loads import MERGE, Load, cut
from gemma_ext.souping.method import Method, TensorInfo, Values
from gemma_ext.souping.plan import Target, plan
from gemma_ext.souping.progress import Progress
from gemma_ext.souping.provenance import file_states, provenance

SHARD_BYTES = 5_000_000_000
CHUNK_BYTES = 4 << 20
MEMORY_BYTES = 512 << 20


def merge_files(
    method: Method,
    models: Sequence[str | Path],
    base: str | Path | None,
    values: Callable[[TensorInfo], Values],
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    skip: bool = False,
    **options: Any,
) -> Path:
    """Merges whole models, tensor by tensor of the same name, into a new folder.

    Args:
        method: how.
        models: M files or folders, see `open_checkpoint`.
        base: that deltas are taken from.
        values: parameters of the method for a tensor of the output.
        out: the folder; it must not exist yet, or be empty.
        dtype, skip: as in `plan`.
        options: as in `write_checkpoint`.

    Returns:
        the folder.

    Raises:
        ValueError: a source is not whole, models do not fit each other or the method, or `out` is
            taken or inside a source.
        OSError: the disk is full, read-only, ... What was written so far is gone on with when the
            same merge is run again.
    """
    sources = [open_checkpoint(path) for path in models]
    origin = None if base is None else open_checkpoint(base)
    targets = plan(method, sources, origin, values, dtype=dtype, skip=skip)
    return write_checkpoint(targets, method, out, **options)


def write_checkpoint(
    targets: Sequence[Target],
    method: Method,
    out: str | Path,
    *,
    recipe: str = "",
    shard_bytes: int = SHARD_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
    memory_bytes: int = MEMORY_BYTES,
    threads: int = 4,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Writes the targets as safetensors; the bytes depend on targets, method and recipe alone.

    Args:
        targets: the output's tensors, in the order of the files they are dealt out to.
        method: merges them.
        out: folder of the output.
        recipe: text that goes into the provenance hash in every file's metadata.
        shard_bytes: most bytes of tensors in a file, unless one tensor is larger.
        chunk_bytes: of one source, read at once.
        memory_bytes: of the ring; more is taken only where one piece of a method's grain needs it.
        threads: that read and write.
        device: that merges.
        progress: called as progress(bytes moved, bytes to move).
        finish: called with the folder before it gets its name, to add files to it.

    Returns:
        the folder.

    Raises:
        ValueError, OSError: as `merge_files`.
    """
    out = Path(os.path.abspath(out))
    for name, value in (
        ("shard_bytes", shard_bytes),
        ("chunk_bytes", chunk_bytes),
        ("memory_bytes", memory_bytes),
        ("threads", threads),
    ):
        if value < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {value}")
    _check_out(out, targets)
    origin = provenance(method, targets, recipe)
    metadata = {"format": "pt", "gemma_ext_merge": origin}
    layout = {t.info.name: (t.dtype, t.info.shape) for t in targets}
    shards = files.lay_out(layout, shard_bytes, metadata)
    partial = out.with_name(f"{out.name}.partial")
    files.check_room(out, partial, sum(shard.nbytes for shard in shards))

    partial.mkdir(parents=True, exist_ok=True)
    journal = journals.Journal(partial, f"{origin} {file_states(targets)}")
    try:
        _create(partial, shards, journal)
        disk = Disk(threads)
        try:
            merge = _Merge(targets, method, partial, shards, disk, journal, torch.device(device))
            merge.run(chunk_bytes, memory_bytes, progress or (lambda done, total: None))
        finally:
            disk.close()
        files.write_index(partial, shards)
        if finish is not None:
            finish(partial)
        for path in partial.iterdir():
            files.sync(path)
        journals.remove(partial)
        files.sync(partial)
        os.rename(partial, out)
        files.sync(out.parent)
    finally:
        journal.close()
    return out


class _Merge:
    """One run over the targets that are not done yet."""

    def __init__(
        self,
        targets: Sequence[Target],
        method: Method,
        folder: Path,
        shards: Sequence[files.Shard],
        disk: Disk,
        journal: journals.Journal,
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

    def run(self, chunk_bytes: int, memory_bytes: int, progress: Progress) -> None:
        self._verify()
        loads = list(cut(self.targets, self.method, self.journal.done, chunk_bytes, memory_bytes))
        if self.method.model_wide and any(load.ends_survey is not None for load in loads):
            for target in self.targets:
                self._state(target)
        total, moved = sum(load.nbytes for load in loads), 0
        most = max((load.memory_bytes for load in loads), default=0)
        ring = Ring(max(most, memory_bytes), pinned=self.device.type == "cuda")
        waiting, reading, writing = deque(loads), deque(), deque()
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

    def _request(self, load: Load, ring: Ring) -> bool:
        """Asks for a load's bytes if there is memory for them."""
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

    def _process(self, load: Load) -> None:
        """Surveys, merges and begins to write what has been read."""
        if load.is_copy:
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
        if load.ends_survey is not None:
            self.method.settle_model(load.ends_survey, self.states)

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

    def _retire(self, load: Load, ring: Ring) -> None:
        """Waits for a load's writes, and notes a tensor that is done."""
        digest = wait(load.asked)
        if load.is_copy:
            return  # cheap to do again, and nobody has read it to know its digest
        ring.give_back()
        if MERGE not in load.passes:
            return
        name = load.target.info.name
        total = (self.digests.pop(name, 0) + digest) % 2**64
        if load.is_last:
            self.states.pop(name, None)
            self.journal.add(journals.Done(name, load.step * load.target.dtype.itemsize, total))
        else:
            self.digests[name] = total


def _convert(load: Load, staged: Tensor, written: Tensor) -> None:
    source, dtype = load.target.sources[0], load.target.dtype
    if source.is_plain and source.stored.dtype == dtype:
        written.copy_(staged)
    else:
        written.view(dtype).copy_(source.deliver(load.start, load.stop, staged))


def _check_out(out: Path, targets: Sequence[Target]) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out: expected a folder that is empty or not there yet, got {out}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got the file {out}")
    folders = {source.stored.path.resolve().parent for t in targets for source in t.inputs}
    for folder in folders:
        if (folder / "config.json").is_file() and folder in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"out: expected a folder outside of the sources, got {out}")


def _create(partial: Path, shards: Sequence[files.Shard], journal: journals.Journal) -> None:
    """Lays out the files; those of another merge go."""
    if not journal.done:
        for path in partial.iterdir():
            if path.name != journals.NAME:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        files.create(partial, shards)
    except OSError as error:
        if not journal.done:
            shutil.rmtree(partial)
        raise OSError(error.errno, f"{partial.parent}: {error.strerror}") from None
