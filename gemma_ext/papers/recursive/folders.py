"""A model's folder as a source of tensors, and one that is filled beside its place."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.extras import require
from gemma_ext.files import sync
from gemma_ext.nn.recursive import decoder_layers
from gemma_ext.nn.recursive.parts import ADAPTER, EXIT_HEAD, INDEX, WEIGHTS
from gemma_ext.papers.recursive.conversion import linear_sizes
from gemma_ext.souping.engine.files import shards
from gemma_ext.souping.engine.files.checkpoint import Checkpoint, open_checkpoint

SHARD_BYTES = 5_000_000_000
_OWN = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json", EXIT_HEAD)
_JOURNAL, _DONE = ".journal", re.compile(r"(\w+) (\d+)\n")
Advance = Callable[[int], None]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Pieces = Iterator[tuple[str, Tensor]]
Part = tuple[str, Pieces]
Group = tuple[Path, Layout, int | None]
"""A folder, its tensors, and the most bytes of a shard; None for one adapter file."""


def check_source(folder: str | Path) -> Path:
    """Raises ValueError where no model is."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"source: expected a model's folder with config.json, got {folder}")
    return Path(folder)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model's folder, looked at without reading its weights.

    Attributes:
        folder, config, tensors: of the model.
        layers: name of its list of layers.
        sizes: [out, in] of each linear of a layer.
        names: of the tensors of a layer.
    """

    folder: Path
    config: Any
    tensors: Checkpoint
    layers: str
    sizes: Mapping[str, tuple[int, int]]
    names: tuple[str, ...]

    @classmethod
    def open(cls, folder: str | Path) -> Source:
        """Raises ValueError where a tensor of a layer is not in the checkpoint."""
        require("a recursive model", "recursive", "transformers", "safetensors")
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = check_source(folder)
        config = AutoConfig.from_pretrained(folder)
        plain = AutoConfig.from_pretrained(folder)
        if hasattr(plain, "recursive"):
            del plain.recursive
        with torch.device("meta"):
            layers, parts = decoder_layers(AutoModelForCausalLM.from_config(plain))
        names = tuple(parts[0].state_dict())
        return cls(folder, config, open_checkpoint(folder), layers, linear_sizes(parts[0]), names)

    def fingerprint(self) -> str:
        """Of config, shapes and samples of the weights."""
        parts = [f"{key} {stored.fingerprint()}" for key, stored in self.tensors.tensors.items()]
        return f"{self.config.to_json_string()}{parts}"

    def read(self, key: str) -> Tensor:
        """A tensor, all of it.

        Raises:
            ValueError: it is not there, or is quantised.
        """
        if key not in self.tensors.tensors:
            raise ValueError(f"{self.folder}: expected the tensor {key}, got none")
        stored = self.tensors.tensors[key]
        if stored.scale is not None:
            raise ValueError(f"{self.folder}: expected plain weights, got {key} in {stored.dtype}")
        return dataclasses.replace(stored).whole  # a copy, which keeps nothing

    def info(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor.

        Raises:
            ValueError: it is not there.
        """
        if key not in self.tensors.tensors:
            raise ValueError(f"{self.folder}: expected the tensor {key}, got none")
        stored = self.tensors.tensors[key]
        return stored.dtype, stored.shape


def fill(partial: Path, groups: Sequence[Group], parts: Iterable[Part], advance: Advance) -> None:
    """Lays out the safetensors files of the groups and fills them; parts that are there stay.

    Raises:
        ValueError: a piece of another dtype or shape than its place.
    """
    places = {}
    for folder, layout, shard_bytes in groups:
        whole = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())
        laid = shards.lay_out(layout, shard_bytes or whole + 1, {"format": "pt"})
        if shard_bytes is None:
            laid = [dataclasses.replace(laid[0], name=ADAPTER)]
        folder.mkdir(exist_ok=True)
        shards.create(folder, laid)
        shards.write_index(folder, laid)
        for shard in laid:
            places |= {key: (folder / shard.name, e) for key, e in shard.tensors.items()}
    with (partial / _JOURNAL).open("a+", encoding="utf-8") as journal:
        journal.seek(0)
        done = {}
        for line in journal.readlines()[1:]:
            if match := _DONE.fullmatch(line):  # an interruption can cut the last one
                done |= {match[1]: int(match[2])}
        for name, pieces in parts:
            if name in done:
                advance(done[name])
                continue
            count = 0
            for count, (key, tensor) in enumerate(pieces, 1):  # noqa: B007
                path, entry = places[key]
                if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
                    raise ValueError(
                        f"{key}: expected {entry.dtype} of {entry.shape}, got {tensor.dtype} of "
                        f"{tuple(tensor.shape)}"
                    )
                with path.open("r+b") as file:
                    file.seek(entry.offset)
                    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
                advance(1)
            for path in {path for path, _ in places.values()}:
                sync(path)
            journal.write(f"\n{name} {count}\n")
            journal.flush()


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer and whatever else stands beside the weights."""
    for path in source.iterdir():
        skipped = path.name in _OWN or path.suffix in (".safetensors", ".bin", ".tmp")
        if path.is_file() and not skipped and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)


def write_config(config: Any, folder: Path, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(folder)


@contextmanager
def beside(out: Path, identity: Any) -> Iterator[Path]:
    """A folder that gets the name `out` when the block ends well.

    What an interrupted run of the same identity left in it is kept, of another is removed.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a folder that is empty or not there yet, got {out}")
    key = hashlib.sha256(repr(identity).encode()).hexdigest()
    partial = out.with_name(f"{out.name}.partial")
    journal = partial / _JOURNAL
    if not journal.exists() or journal.read_text(encoding="utf-8").split("\n", 1)[0] != key:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        journal.write_text(f"{key}\n", encoding="utf-8")
    try:
        yield partial
    except (ValueError, TypeError):  # the same again would end here again
        shutil.rmtree(partial)
        raise
    journal.unlink()
    for path in partial.rglob("*"):
        sync(path)
    os.replace(partial, out)
