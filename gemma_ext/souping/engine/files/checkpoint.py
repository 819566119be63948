"""A model's tensors on disk, found without reading them.

A checkpoint is a file or a folder: `model.safetensors`, shards with an index beside them, or the
same as `.bin`, which is read through torch's loader of plain weights alone. Scales of fp8 weights
are part of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gemma_ext.souping.engine.files.header import read_header
from gemma_ext.souping.engine.files.scales import check_scales, pair_scales

SAMPLE = 4096  # bytes at the start, in the middle and at the end of a tensor, for its fingerprint
_SINGLE = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Stored:
    """A tensor that can be read in pieces.

    Attributes:
        dtype, shape: as stored.
        path: of its file.
        offset: of its first byte in a safetensors file.
        tensor: contiguous, where it is not in such a file.
        mapped: whether that one is a file's pages.
        scale: of an fp8 weight: what its values are multiplied by, see `scales`.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int = 0
    tensor: Tensor | None = None
    mapped: bool = False
    scale: Stored | None = None

    @staticmethod
    def of(tensor: Tensor, path: Path = Path("memory"), mapped: bool = False) -> Stored:
        """A tensor in memory as one that is read in pieces; copied if it is not contiguous."""
        tensor, whole = tensor.detach().contiguous(), tensor.is_contiguous()
        return Stored(tensor.dtype, tuple(tensor.shape), path, 0, tensor, mapped and whole)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def fingerprint(self) -> str:
        """SHA-256 of dtype, shape and samples of the bytes.

        It costs three small reads; a change between the samples goes unseen.
        """
        seen = hashlib.sha256(repr((self.dtype, self.shape)).encode())
        for piece in _samples(self):
            seen.update(piece)
        if self.scale is not None:
            seen.update(self.scale.fingerprint().encode())
        return seen.hexdigest()

    @cached_property
    def whole(self) -> Tensor:
        """All of it, in memory from then on: for what is small beside the weights."""
        if self.tensor is not None:
            return self.tensor
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = bytearray(file.read(self.nbytes))
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model, by name.

    Attributes:
        path: the file or folder.
        tensors: in the order of the checkpoint's own files.
    """

    path: Path
    tensors: Mapping[str, Stored]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """What is in a checkpoint; headers are checked, weights are not read.

    Args:
        path: a `.safetensors` or `.bin` file, or the folder of a model.

    Raises:
        ValueError: nothing there, an index that does not fit its files, a file that is not whole,
            fp8 weights whose scales cannot be applied.
        OSError: a file that cannot be read.
    """
    path = Path(path)
    tensors = _find(path)
    try:
        return Checkpoint(path, _scaled(tensors))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _scaled(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """With the scales of fp8 weights where they belong, instead of beside them."""
    scales, dropped = pair_scales({name: stored.dtype for name, stored in tensors.items()})
    dropped |= set(scales.values())
    for name, scale in scales.items():
        check_scales(name, tensors[name].shape, tensors[scale].shape)
    return {
        name: replace(stored, scale=tensors[scales[name]]) if name in scales else stored
        for name, stored in tensors.items()
        if name not in dropped
    }


def _find(path: Path) -> dict[str, Stored]:
    if path.is_file():
        return dict(_read(path))
    if not path.is_dir():
        raise ValueError(f"expected a checkpoint's file or folder, got {path}, which is not there")
    for name in _SINGLE:
        if (path / name).is_file():
            return dict(_read(path / name))
        index = path / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index)
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return dict(_read(others[0]))
    raise ValueError(
        f"expected model.safetensors, pytorch_model.bin or an index of shards in {path}, got "
        f"{', '.join(p.name for p in others) or 'neither'}"
    )


def _read_shards(index: Path) -> dict[str, Stored]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index}: expected a weight_map of tensor names to files, got {error!r}"
        ) from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: expected files beside the index, got {shard!r}")
        if not (index.parent / shard).is_file():
            count = sum(place == shard for place in places.values())
            raise ValueError(f"{index.parent}: missing shard {shard}, which holds {count} tensors")
    found = {shard: dict(_read(index.parent / shard)) for shard in shards}
    for name, shard in places.items():
        if name not in found[shard]:
            raise ValueError(f"{index}: expected tensor {name!r} in {shard}, which has none")
    return {
        name: stored
        for shard in shards
        for name, stored in found[shard].items()
        if places.get(name) == shard
    }


def _read(path: Path) -> Iterator[tuple[str, Stored]]:
    if path.suffix == ".safetensors":
        entries, _ = read_header(path)
        for name, entry in entries.items():
            yield name, Stored(entry.dtype, entry.shape, path, entry.offset)
        return
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        first = str(error).split("\n")[0]
        raise ValueError(f"{path}: expected a file of plain weights, got: {first}") from None
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path}: expected names and tensors, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        yield name, Stored.of(tensor, path, mapped=True)


def _samples(stored: Stored) -> Iterator[bytes]:
    size = stored.nbytes
    if size <= 3 * SAMPLE:
        spans = [(0, size)]
    else:
        spans = [(at, SAMPLE) for at in (0, (size - SAMPLE) // 2, size - SAMPLE)]
    if stored.tensor is not None:
        data = stored.tensor.view(-1).view(torch.uint8) if size else torch.empty(0)
        yield from (data[at : at + length].numpy().tobytes() for at, length in spans)
        if stored.mapped:
            from gemma_ext._host import drop_mapped

            drop_mapped(stored.tensor.data_ptr(), size)  # a large page or three of every tensor
        return
    with stored.path.open("rb") as file:
        for at, length in spans:
            file.seek(stored.offset + at)
            yield file.read(length)
