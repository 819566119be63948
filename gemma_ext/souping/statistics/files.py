"""Tensors by weight name that some methods want beside each model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from gemma_ext.files import replacing
from gemma_ext.ops.souping import Part
from gemma_ext.souping.method import Values

_ALIASES = "gemma_ext.same_as"


class Statistics:
    """One mapping per model: given, or read from the files that a recipe names under `key`.

    Args:
        key: parameter of the method, a path per model.
        given: of each model, weight name to tensor.
    """

    def __init__(self, key: str, given: Sequence[Mapping[str, Tensor]] | None = None) -> None:
        self.key = key
        self.given = given
        self.opened: dict[str, Mapping[str, Tensor]] = {}

    def of(self, name: str, values: Values, shape: Sequence[int]) -> list[Tensor | None]:
        """What each of the M models has for a weight, of the given shape.

        Raises:
            ValueError: there is nothing to read, or not for as many models as are merged, only
                for some of them, or of another shape.
        """
        found = [tensors.get(name) for tensors in self.all(values)]
        missing = [index for index, tensor in enumerate(found) if tensor is None]
        if missing and len(missing) < len(found):
            raise ValueError(
                f"expected {self.key} of {name} for every model or for none, "
                f"got none for model {missing[0]}"
            )
        for tensor in found:
            if tensor is not None and tuple(tensor.shape) != tuple(shape):
                raise ValueError(
                    f"expected {self.key} of {name} to be {list(shape)}, got {list(tensor.shape)}"
                )
        return found

    def all(self, values: Values) -> Sequence[Mapping[str, Tensor]]:
        """The M mappings."""
        held = self.given
        if held is None:
            held = [self._open(path) for path in values.of(self.key)]
        if len(held) != len(values.models):
            raise ValueError(f"expected {self.key} of {len(values.models)} models, got {len(held)}")
        return held

    def _open(self, path: str | None) -> Mapping[str, Tensor]:
        if path is None:
            raise ValueError(f"expected {self.key} of every model: a file each, got none")
        if path not in self.opened:
            self.opened[path] = StatisticsFile(path)
        return self.opened[path]


def run_of(tensors: Sequence[Tensor], part: Part) -> list[Tensor]:
    """What whole tensors hold where the part is, in its shape."""
    x = part.sources[0]
    run = slice(part.offset, part.offset + x.numel())
    return [tensor.reshape(-1)[run].view(x.shape).to(x.device) for tensor in tensors]


class StatisticsFile(Mapping[str, Tensor]):
    """A file of `save_statistics`; tensors are read when asked for."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from safetensors import safe_open

        self.file = safe_open(os.fspath(path), "pt")
        metadata = self.file.metadata() or {}
        self.aliases = json.loads(metadata.get(_ALIASES, "{}"))
        self.names = {*self.file.keys(), *self.aliases}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.file.get_tensor(self.aliases.get(name, name))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)


def save_statistics(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes a safetensors file, beside first; a tensor under several names is stored once."""
    from safetensors.torch import save_file

    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            aliases[name] = owner
    stored = {name: tensors[name].contiguous() for name in tensors if name not in aliases}
    with replacing(Path(path)) as beside:
        save_file(stored, beside, metadata={_ALIASES: json.dumps(aliases)})
