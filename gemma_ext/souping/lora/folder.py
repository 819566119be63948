"""peft's adapter folders: `adapter_config.json` and the weights, as they are stored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.souping.lora.factors import Factors

CONFIG = "adapter_config.json"
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
# what peft offers beside W + s B A
_BEYOND = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
    *("kasa_config", "arrow_config", "monteclora_config"),
)


@dataclass(frozen=True)
class Folder:
    """What an adapter folder holds; modules are named as in the base model.

    Attributes:
        factors: by module. Those of an embedding update its transpose.
        embeddings: which modules are embeddings.
        whole: weights stored as a whole, by module: of `modules_to_save`, and of embeddings beside
            their update.
        config: of peft.
    """

    factors: Mapping[str, Factors]
    embeddings: frozenset[str]
    whole: Mapping[str, Tensor]
    config: Mapping[str, Any]


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_folder(folder: Path) -> Folder:
    """Reads an adapter folder.

    Raises:
        ValueError: no LoRA adapter, one that does more than W + s B A, or a module with one of its
            two factors; in one sentence.
    """
    config = _read_config(folder / CONFIG)
    sides: dict[str, dict[str, Tensor]] = {}
    embeddings, whole = set(), {}
    for key, tensor in _read_weights(folder).items():
        key = key.removeprefix(PREFIX)
        if found := _KEY.fullmatch(key):
            sides.setdefault(found["module"], {})[found["side"]] = tensor
            if found["embedding"]:
                embeddings.add(found["module"])
        else:
            module = key.removesuffix(".weight").replace(".modules_to_save", "")
            whole[module.removesuffix(".base_layer")] = tensor
    factors = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or pair["A"].dim() != 2 or pair["B"].dim() != 2:
            raise ValueError(f"{folder}: expected two matrices A and B of {module}, got others")
        factors[module] = Factors(pair["A"], pair["B"], _scaling(config, module, len(pair["A"])))
    return Folder(factors, frozenset(embeddings), whole, config)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{path.parent}: expected an {CONFIG} of peft, got none") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: expected a LoRA adapter, got {config.get('peft_type')}")
    beyond = [key for key in _BEYOND if config.get(key)]
    beyond += ["bias"] if config.get("bias", "none") != "none" else []
    if beyond:
        raise ValueError(f"{path}: {', '.join(beyond)}: expected W + s B A alone")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if (folder / WEIGHTS).is_file():
        return load_file(folder / WEIGHTS)
    if (folder / PICKLED).is_file():
        return torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
    raise ValueError(f"{folder}: expected {WEIGHTS} or {PICKLED}, got neither")


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """s of s B A: alpha / r, or alpha / sqrt(r) with rsLoRA, alpha from the module's pattern."""
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """As peft reads rank_pattern and alpha_pattern: a key is the end of a name, as a regex."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
