"""LoRA adapters of one base model, merged into one that peft loads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_ext.files import write_safetensors, write_text
from gemma_ext.souping.lora.factors import Factors, merge_factors
from gemma_ext.souping.lora.folder import CONFIG, PREFIX, WEIGHTS, read_folder


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
    read = read_folder(Path(path))
    for module in read.whole:
        if module not in read.embeddings:
            raise ValueError(f"{path}: expected LoRA factors alone, got all of {module}")
    return Adapter(read.factors, read.config, read.embeddings)


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
    folder = Path(path)
    tensors = {}
    for module, factors in adapter.factors.items():
        embedding = module in adapter.embeddings
        for side, tensor in (("A", factors.a), ("B", factors.b)):
            name = f"lora_embedding_{side}" if embedding else f"lora_{side}.weight"
            tensors[f"{PREFIX}{module}.{name}"] = tensor
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_text(folder / CONFIG, json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")


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
