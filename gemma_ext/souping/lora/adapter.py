"""peft's adapter folders: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_ext.souping.lora.factors import Factors, merge_factors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")


@dataclass(frozen=True)
class Adapter:
    """LoRA updates of a model's modules.

    Attributes:
        factors: by module name in the base model (`model.layers.0.mlp.up_proj`). Those of an
            embedding update its transpose: weight += scaling * (b @ a).T
        embeddings: which modules are embeddings.
        config: of peft.
    """

    factors: Mapping[str, Factors]
    config: Mapping[str, Any]
    embeddings: frozenset[str] = frozenset()


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter folder. Embeddings that peft stores beside their updates are left out.

    Raises:
        ValueError: it is no LoRA of weights alone (DoRA, trained biases, modules saved whole), or
            a module has only one of its two factors.
    """
    from safetensors.torch import load_file

    folder = Path(path)
    config = json.loads((folder / CONFIG).read_text())
    _check(config, folder)
    sides: dict[str, dict[str, Any]] = {}
    embeddings = set()
    for key, tensor in load_file(folder / WEIGHTS).items():
        if key.endswith(".base_layer.weight"):
            continue
        found = _KEY.match(key)
        if not found:
            raise ValueError(f"expected LoRA factors in {folder / WEIGHTS}, got {key}")
        module = found["module"].removeprefix(_PREFIX)
        sides.setdefault(module, {})[found["side"]] = tensor
        if found["embedding"]:
            embeddings.add(module)
    factors = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or pair["A"].dim() != 2 or pair["B"].dim() != 2:
            raise ValueError(f"expected two matrices A and B of {module} in {folder / WEIGHTS}")
        factors[module] = Factors(pair["A"], pair["B"], scaling(config, module, len(pair["A"])))
    return Adapter(factors, config, frozenset(embeddings))


def merge_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combination_type: str = "svd",
    **options: Any,
) -> Adapter:
    """One adapter out of K of the same base model.

    Args:
        adapters: a module that only some of them have is merged from those.
        weights: K numbers of any sign.
        combination_type, options: see `merge_factors`.

    Raises:
        ValueError: see `merge_factors`; or no adapter.
    """
    if not adapters:
        raise ValueError("expected at least one adapter, got none")
    if len(weights) != len(adapters):
        raise ValueError(f"expected {len(adapters)} weights, got {len(weights)}")
    modules = dict.fromkeys(module for adapter in adapters for module in adapter.factors)
    merged = {}
    for module in modules:
        held = [
            (a.factors[module], w)
            for a, w in zip(adapters, weights, strict=True)
            if module in a.factors
        ]
        merged[module] = merge_factors(
            [f for f, _ in held], [w for _, w in held], combination_type, name=module, **options
        )
    embeddings = frozenset().union(*(adapter.embeddings for adapter in adapters))
    return Adapter(merged, _config(adapters[0].config, merged), embeddings)


def save_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Writes an adapter folder that peft loads; each file beside and renamed."""
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, factors in adapter.factors.items():
        embedding = module in adapter.embeddings
        for side, tensor in (("A", factors.a), ("B", factors.b)):
            name = f"lora_embedding_{side}" if embedding else f"lora_{side}.weight"
            tensors[f"{_PREFIX}{module}.{name}"] = tensor.contiguous()
    beside = folder / f"{WEIGHTS}.part"
    save_file(tensors, beside, metadata={"format": "pt"})
    os.replace(beside, folder / WEIGHTS)
    beside = folder / f"{CONFIG}.part"
    beside.write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
    os.replace(beside, folder / CONFIG)


def _check(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"expected a LoRA adapter in {folder}, got {config['peft_type']}")
    for key, harmless in (("use_dora", False), ("bias", "none"), ("modules_to_save", None)):
        if config.get(key, harmless) not in (harmless, None, []):
            raise ValueError(
                f"expected {key} of {folder / CONFIG} to be {harmless!r}, got {config[key]!r}"
            )


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """s of s B A: alpha / r, or alpha / sqrt(r) with rsLoRA, alpha from the module's pattern."""
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """As peft reads rank_pattern and alpha_pattern: a key is the end of a name, as a regex."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _config(first: Mapping[str, Any], merged: Mapping[str, Factors]) -> dict[str, Any]:
    ranks = {module: factors.rank for module, factors in merged.items()}
    most = max(ranks.values(), default=0)
    others = {re.escape(module): rank for module, rank in ranks.items() if rank != most}
    return {
        **first,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "inference_mode": True,
    }
