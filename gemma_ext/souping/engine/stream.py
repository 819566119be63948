"""Merging checkpoints from disk to disk in bounded memory.

Chunks of M + 1 models are read ahead into rings of memory, merged, and written behind to files that
were laid out before the first weight was read. What the method has to see more than once is kept in
a ring where it fits and read again where it does not. The output appears under its name
when it is whole; until then it is in `OUT.partial`, with a journal that a later run goes on from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gemma_ext.files import sync
from gemma_ext.progress import Moved
from gemma_ext.souping.engine.files import journal as journals
from gemma_ext.souping.engine.files import shards as files
from gemma_ext.souping.engine.files.checkpoint import open_checkpoint
from gemma_ext.souping.engine.files.disk import check_host
from gemma_ext.souping.engine.plan import Target, plan
from gemma_ext.souping.engine.provenance import file_states, provenance
from gemma_ext.souping.engine.run import Run
from gemma_ext.souping.method import Method, TensorInfo, Values

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
    progress: Moved | None = None,
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
        memory_bytes: for all that is in flight; more is taken only where one piece of a method's
            grain needs it.
        threads: of a lane, that read and write.
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
    _check_names(targets)
    _check_out(out, targets)
    check_host()
    metadata = {"format": "pt", "gemma_ext_merge": provenance(method, targets, recipe)}
    layout = {t.info.name: (t.dtype, t.info.shape) for t in targets}
    shards = files.lay_out(layout, shard_bytes, metadata)
    partial = out.with_name(f"{out.name}.partial")
    files.check_room(out, partial, sum(shard.nbytes for shard in shards))
    journal = _open_journal(partial, _key(shards, targets))
    try:
        _create(partial, shards, journal)
        report = progress or (lambda done, total: None)
        run = Run(targets, method, partial, shards, journal, torch.device(device), report)
        run.go(threads, chunk_bytes, memory_bytes)
        files.write_index(partial, shards)
        if finish is not None:
            finish(partial)
        _publish(partial, out)
    except (ValueError, TypeError):  # the same again would end here again
        shutil.rmtree(partial)
        raise
    finally:
        journal.close()
    return out


def _key(shards: Sequence[files.Shard], targets: Sequence[Target]) -> str:
    """Of what a journal's lines hold for: the output to the byte, and sources as they are now."""
    seen = hashlib.sha256(file_states(targets).encode())
    for shard in shards:
        seen.update(shard.name.encode() + shard.header)
    return seen.hexdigest()


def _check_names(targets: Sequence[Target]) -> None:
    counts = Counter(target.info.name for target in targets)
    if len(counts) < len(targets):
        (name, count), *_ = counts.most_common(1)
        raise ValueError(f"targets: expected every name once, got {name!r} {count} times")


def _check_out(out: Path, targets: Sequence[Target]) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out: expected a folder that is empty or not there yet, got {out}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got the file {out}")
    folders = {source.stored.path.parent.resolve() for t in targets for source in t.inputs}
    for folder in folders:
        if (folder / "config.json").is_file() and folder in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"out: expected a folder outside of the sources, got {out}")


def _open_journal(partial: Path, key: str) -> journals.Journal:
    try:
        partial.mkdir(parents=True, exist_ok=True)
        return journals.Journal(partial, key)
    except PermissionError as error:
        reason = f"cannot write to {partial.parent}: {error.strerror}"
        raise OSError(error.errno, f"out: {reason}") from None


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


def _publish(partial: Path, out: Path) -> None:
    """Gives the folder its name once all of it is on the disk."""
    for path in partial.iterdir():
        sync(path)
    journals.remove(partial)
    sync(partial)
    os.rename(partial, out)
    sync(out.parent)
