"""The safetensors files of an output: laid out before a weight is read, filled in any order."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma_ext.souping.engine.files.header import Entry, build_header

INDEX = "model.safetensors.index.json"
Shape = Sequence[int]


@dataclass(frozen=True)
class Shard:
    """A file of the output.

    Attributes:
        name: of the file.
        header: its first bytes.
        tensors: where each one goes.
    """

    name: str
    header: bytes
    tensors: Mapping[str, Entry]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(entry.nbytes for entry in self.tensors.values())


def lay_out(
    tensors: Mapping[str, tuple[torch.dtype, Shape]], shard_bytes: int, metadata: Mapping[str, str]
) -> list[Shard]:
    """Files of at most `shard_bytes` of tensors each, in the order given; a tensor is never cut."""
    groups: list[dict[str, tuple[torch.dtype, Shape]]] = [{}]
    room = shard_bytes
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if size > room and groups[-1]:
            groups.append({})
            room = shard_bytes
        groups[-1][name] = (dtype, shape)
        room -= size
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    return [
        Shard(name, *build_header(group, metadata))
        for name, group in zip(names, groups, strict=True)
    ]


def create(folder: Path, shards: Sequence[Shard]) -> None:
    """Makes the files at their full size, headers written; existing ones keep their tensors.

    Raises:
        OSError: the disk is full, the folder read-only, ...
    """
    from gemma_ext._host import reserve

    for shard in shards:
        fd = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            reserve(fd, shard.nbytes)
            os.pwrite(fd, shard.header, 0)
        finally:
            os.close(fd)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The index of several shards; a single file has none."""
    if len(shards) == 1:
        return
    entries = {name: (shard, entry) for shard in shards for name, entry in shard.tensors.items()}
    index = {
        "metadata": {"total_size": sum(entry.nbytes for _, entry in entries.values())},
        "weight_map": {name: entries[name][0].name for name in sorted(entries)},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_room(out: Path, partial: Path, needed: int) -> None:
    """Raises an OSError if `needed` bytes, less those that `partial` has already, are not free."""
    present = 0
    if partial.is_dir():
        for path in partial.iterdir():
            with suppress(OSError):
                present += path.stat().st_blocks * 512
    stats = os.statvfs(next(folder for folder in out.parents if folder.is_dir()))
    free = stats.f_bavail * stats.f_frsize
    if needed - present > free:
        raise OSError(
            errno.ENOSPC,
            f"{out.parent}: expected {(needed - present) / 1e9:.3f} GB of free disk for the "
            f"merge, got {free / 1e9:.3f}",
        )
