"""The experts that a population is made of: LoRA adapters of one base, or whole checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.files import new_folder, write_safetensors

_ADAPTER, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FACTOR_A = re.compile(r"(?<=\.lora_)(embedding_)?A(?=\.|$)")
_SAME = (
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
)
"""Adapter settings under which the mean of factors means anything."""


class Pool:
    """M experts with the same tensors.

    Args:
        experts: M mappings name -> tensor; floating dtypes may differ.
        base: where deltas are taken from; None for LoRA factors, whose base is 0.
        names: of the experts, for tables.
        settings: the adapters' common `adapter_config.json`.
        folder: of the first expert: files that a saved individual inherits.

    Raises:
        ValueError: no expert, or tensors that differ in name or shape; the sentence says which.
    """

    def __init__(
        self,
        experts: Sequence[Mapping[str, Tensor]],
        base: Mapping[str, Tensor] | None = None,
        *,
        names: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        if not experts:
            raise ValueError("experts: expected at least one, got none")
        self.experts, self.base, self.settings, self.folder = list(experts), base, settings, folder
        self.names = [f"expert {i}" for i in range(len(experts))] if names is None else list(names)
        self.shapes = {name: x.shape for name, x in sorted(experts[0].items())}
        self.device = next(iter(experts[0].values())).device
        rest = list(zip(self.names, experts, strict=True))[1:]
        for who, tensors in rest if base is None else [*rest, ("the base", base)]:
            _check_same(self.names[0], self.shapes, who, tensors)

    @cached_property
    def factors(self) -> list[tuple[str, str]]:
        """(name of A, name of B) of every LoRA pair."""
        pairs = [(n, _FACTOR_A.sub(r"\1B", n)) for n in self.shapes if _FACTOR_A.search(n)]
        return [(a, b) for a, b in pairs if b in self.shapes]

    @cached_property
    def units(self) -> list[list[str]]:
        """All names, pairs of factors together."""
        paired = {name for pair in self.factors for name in pair}
        return [list(p) for p in self.factors] + [[n] for n in self.shapes if n not in paired]

    @cached_property
    def digest(self) -> str:
        """sha256 of every expert's and the base's content."""
        digest = hashlib.sha256()
        for tensors in [*self.experts, *([] if self.base is None else [self.base])]:
            for name in self.shapes:
                x = tensors[name].detach().cpu().contiguous()
                digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
                digest.update(x.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]

    def to(self, device: str | torch.device) -> Pool:
        """The same pool with resident copies on a device."""
        moved = [{n: x.to(device) for n, x in t.items()} for t in self.experts]
        base = None if self.base is None else {n: x.to(device) for n, x in self.base.items()}
        return Pool(moved, base, names=self.names, settings=self.settings, folder=self.folder)

    def save(self, tensors: Mapping[str, Tensor], out: Path) -> None:
        """Writes an individual as an adapter or checkpoint folder, beside and renamed.

        Configuration and tokenizer are those of the first expert.

        Raises:
            FileExistsError: `out` is there.
        """
        if out.exists():
            raise FileExistsError(f"out: expected a folder that does not exist, got {out}")
        with new_folder(out) as beside:
            self.fill(beside, tensors)

    def fill(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Writes the files of an individual into a folder that nobody reads yet."""
        for path in sorted(self.folder.iterdir()) if self.folder else ():
            if path.is_file() and not _is_weights(path):
                shutil.copy(path, folder)
        name = "model.safetensors" if self.settings is None else _ADAPTER
        kept = {n: tensors[n].to(self.experts[0][n].dtype) for n in self.shapes}
        write_safetensors(folder / name, kept, {"format": "pt"})


def load_adapters(folders: Sequence[str | Path]) -> Pool:
    """PEFT adapter folders of one base.

    Raises:
        ValueError: settings that differ, or a file that is missing.
    """
    from safetensors.torch import load_file

    folders = [Path(folder) for folder in folders]
    settings, experts = [], []
    for folder in folders:
        for name in (_CONFIG, _ADAPTER):
            if not (folder / name).is_file():
                raise ValueError(f"adapters: expected {name} in {folder}, got none")
        settings.append(json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
        experts.append(load_file(folder / _ADAPTER))
    for folder, other in zip(folders[1:], settings[1:], strict=True):
        for key in _SAME:
            want, got = _plain(settings[0].get(key)), _plain(other.get(key))
            if want != got:
                raise ValueError(
                    f"adapters: expected {key} {want} as in {folders[0]}, got {got} in {folder}"
                )
    names = [folder.name for folder in folders]
    return Pool(experts, names=names, settings=settings[0], folder=folders[0] if folders else None)


def load_checkpoints(folders: Sequence[str | Path], base: str | Path | None = None) -> Pool:
    """Folders with model.safetensors, or shards and their index; tensors stay in the files.

    Args:
        base: what deltas are taken from; without it, sums of weights other than 1 scale the model.
    """
    folders = [Path(folder) for folder in folders]
    experts = [_Files(folder) for folder in folders]
    names = [folder.name for folder in folders]
    return Pool(
        experts,
        None if base is None else _Files(Path(base)),
        names=names,
        folder=folders[0] if folders else None,
    )


class _Files(Mapping[str, Tensor]):
    """The floating tensors of a folder, read when asked for."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        else:
            files = ["model.safetensors"]
        self._places = {}
        for name in files:
            if not (folder / name).is_file():
                raise ValueError(f"checkpoints: expected {name} in {folder}, got none")
            file = safe_open(folder / name, framework="pt")
            for key in file.keys():  # noqa: SIM118 (a handle, not a mapping)
                if file.get_slice(key).get_dtype() in ("F32", "BF16", "F16"):
                    self._places[key] = file

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].get_tensor(name)

    def __iter__(self):
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _check_same(
    first: str, shapes: Mapping[str, torch.Size], who: str, tensors: Mapping[str, Tensor]
) -> None:
    odd = sorted(set(shapes) ^ set(tensors))
    if odd:
        raise ValueError(
            f"experts: expected the same tensors in {first} and {who}, got {odd[0]!r} in one"
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            got = list(tensors[name].shape)
            raise ValueError(f"experts: expected {name!r} of {who} to be {list(shape)}, got {got}")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value or None


def _is_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".pt") or path.name.endswith(".index.json")
