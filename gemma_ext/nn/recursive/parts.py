"""The files of a recursive model: their names, and how they are read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from gemma_ext.files import write_json, write_safetensors
from gemma_ext.nn.recursive.plan import Plan

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LORA, ADAPTER, ADAPTER_CONFIG = "depth_lora", "adapter_model.safetensors", "adapter_config.json"
GENERATION = "generation_config.json"
PREFIX, EXIT_HEAD = "depth_prefix.safetensors", "exit_head.safetensors"
CONFIG, PEFT = "config.json", "base_model.model."


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors` or its shards.

    Raises:
        ValueError: neither is there.
    """
    from safetensors.torch import load_file

    if names := _shards(folder):
        return {k: t for name in names for k, t in load_file(folder / name).items()}
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder}: expected {WEIGHTS} or {INDEX}, got neither")
    return load_file(folder / WEIGHTS)


def read_part(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        ValueError: it is not there.
    """
    from safetensors.torch import load_file

    if not path.exists():
        raise ValueError(f"expected the file {path}, which the plan asks for, got none")
    return load_file(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file as transformers and PEFT read it."""
    write_safetensors(path, tensors, {"format": "pt"})


def write_adapter_config(folder: Path, plan: Plan, layers: str) -> None:
    """`adapter_config.json` with which PEFT puts the matrices on L tied layers, at scale 1.

    Args:
        folder: of the model.
        layers: name of its list of layers.
    """
    ranks = {name: rank for name, rank in plan.ranks.items() if rank}
    most = max(ranks.values())
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "layers_to_transform": [
            depth
            for depth in range(plan.layers)
            if any(plan.rank_of(depth, linear) for linear in ranks)
        ],
        "layers_pattern": layers.rsplit(".", 1)[-1],
    }
    write_json(folder / LORA / ADAPTER_CONFIG, record)


def lora_key(layers: str, depth: int, linear: str, factor: str) -> str:
    """The name of a matrix in the adapter's file; `factor` is "A" or "B"."""
    return f"{PEFT}{layers}.{depth}.{linear}.lora_{factor}.weight"


def replace_model(made: Path, folder: Path) -> None:
    """Moves the files in `made` to their places in `folder`; what the model there had more goes.

    config.json comes last: without it a folder holds no model.
    """
    files = sorted(
        (path.relative_to(made) for path in made.rglob("*") if path.is_file()),
        key=lambda path: path == Path(CONFIG),
    )
    inside = (name for name in _shards(folder) if name == Path(name).name)
    old = [Path(INDEX), Path(LORA, ADAPTER), Path(LORA, ADAPTER_CONFIG), Path(PREFIX)]
    old += [Path(EXIT_HEAD), Path(GENERATION), *map(Path, inside)]
    for path in files[:-1]:
        (folder / path).parent.mkdir(exist_ok=True)
        os.replace(made / path, folder / path)
    for path in old:
        if path not in files:
            (folder / path).unlink(missing_ok=True)
    with suppress(OSError):  # it is not there, or holds files of others
        (folder / LORA).rmdir()
    os.replace(made / files[-1], folder / files[-1])


def _shards(folder: Path) -> list[str]:
    if not (folder / INDEX).exists():
        return []
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return sorted(set(index["weight_map"].values()))
