"""A LoRA adapter of peft, added to the weights of its model while they are read.

    W' = W + s B A,  s = alpha / r, or alpha / sqrt(r) with rsLoRA

row by row and without a merged copy on disk, the product and the sum in float64 and rounded once,
to float32. What the adapter replaces as a whole (`modules_to_save`) is taken from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.souping.lora.adapter import scaling

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_LORA = re.compile(
    r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?"
)
# what peft offers beside W + s B A
_BEYOND = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
    *("kasa_config", "arrow_config", "monteclora_config"),
)


@dataclass(frozen=True)
class LowRank:
    """s B A of one weight.

    Attributes:
        left: [rows, r] float64, scaled. right: [r, columns] float64.
        dtype: that W' is rounded to; None for float32.
    """

    left: Tensor
    right: Tensor
    dtype: torch.dtype | None = None

    def __call__(self, rows: Tensor, first: int) -> Tensor:
        """W' of some rows: [n, columns] of W from row `first` on; float32 or `dtype`."""
        piece = self.left[first : first + len(rows)]
        whole = torch.addmm(rows.double(), piece, self.right)
        return whole.float().to(self.dtype or torch.float32)

    @cached_property
    def fingerprint(self) -> str:
        seen = hashlib.sha256(str(self.dtype).encode())
        for factor in (self.left, self.right):
            seen.update(factor.numpy().tobytes())
        return seen.hexdigest()


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to the weights of its model.

    Attributes:
        deltas: by the name of the weight.
        replaced: whole tensors by name; a delta for one is added to it.
    """

    deltas: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor]


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def read_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None = None
) -> Adapter:
    """An adapter for a model whose tensors have `shapes`.

    Args:
        dtype: that adapted weights are rounded to before the merge; None for not at all.

    Raises:
        ValueError: no LoRA adapter, one that does more than LoRA, or one that does not fit the
            model; in one sentence.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{folder}: expected an adapter_config.json of peft, got none") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: expected a LoRA adapter, got {config.get('peft_type')}")
    beyond = [key for key in _BEYOND if config.get(key)]
    beyond += ["bias"] if config.get("bias", "none") != "none" else []
    if beyond:
        raise ValueError(f"{path}: {', '.join(beyond)}: expected W + s B A alone")
    factors: dict[str, dict[str, Tensor]] = {}
    replaced = {}
    for key, tensor in _read(folder).items():
        if match := _LORA.fullmatch(key):
            kind = match[2].replace("lora_", "").replace("embedding_", "E")
            factors.setdefault(_name_in(shapes, match[1], folder), {})[kind] = tensor
        else:
            name = key.removeprefix("base_model.model.").removesuffix(".weight")
            name = name.replace(".modules_to_save", "").removesuffix(".base_layer")
            replaced[_name_in(shapes, name, folder)] = tensor
    deltas = {}
    for name, pair in factors.items():
        shape = tuple(replaced[name].shape) if name in replaced else shapes[name]
        deltas[name] = _low_rank(name, pair, shape, config, folder, dtype)
    return Adapter(deltas, replaced)


def _low_rank(
    name: str,
    pair: Mapping[str, Tensor],
    shape: tuple[int, ...],
    config: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype | None,
) -> LowRank:
    embedding = "EA" in pair or "EB" in pair
    a, b = (pair.get("EA"), pair.get("EB")) if embedding else (pair.get("A"), pair.get("B"))
    if a is None or b is None:
        raise ValueError(f"{folder}: expected both factors for {name}, got one")
    scale = scaling(config, name.removesuffix(".weight"), a.shape[0])
    # an embedding's weight is [V, D] = (B A)^T, and so is that of a transposed (Conv1D) layer
    if embedding or config.get("fan_in_fan_out"):
        left, right = a.T, b.T
    else:
        left, right = b, a
    if (left.shape[0], right.shape[1]) != shape:
        raise ValueError(
            f"{folder}: expected factors of {name} for {list(shape)}, got "
            f"{[left.shape[0], right.shape[1]]}"
        )
    return LowRank(scale * left.double().contiguous(), right.double().contiguous(), dtype)


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    for name in _WEIGHTS:
        path = folder / name
        if path.is_file():
            if path.suffix == ".safetensors":
                return load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    raise ValueError(f"{folder}: expected {' or '.join(_WEIGHTS)}, got neither")


def _name_in(shapes: Mapping[str, tuple[int, ...]], module: str, folder: Path) -> str:
    """The model's tensor that a module of the adapter means; a prefix may have been added."""
    wanted = f"{module}.weight"
    if wanted in shapes:
        return wanted
    ends = [name for name in shapes if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    raise ValueError(f"{folder}: the model has no tensor {wanted}, which the adapter changes")
