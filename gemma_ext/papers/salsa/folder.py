"""A soup on disk: a folder of transformers, with `soup.json` about where it comes from.

    {"format": 1, "parents": [{"name": ..., "sha256": ...}, ...], "weights": [0.5, 0.5],
     "alpha": 0.5, "compute": "float32", "dtype": "bfloat16", "rounding": "nearest", "seed": 0,
     "sha256": ..., "checks": {...}}

`alpha` is the first of two weights, null where there are more or they differ by layer.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemma_ext.files import read_json, write_json
from gemma_ext.papers.salsa.soup import Weights
from gemma_ext.souping.live import parameters_of

RECORD = "soup.json"


def digest(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every parameter, by name; ties count once."""
    seen = hashlib.sha256()
    for name, tensor in sorted(parameters_of(model).items()):
        seen.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        seen.update(flat.view(torch.uint8).numpy())
    return seen.hexdigest()


def record(
    parents: Mapping[str, nn.Module],
    weights: Weights,
    soup: nn.Module,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    checks: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `soup.json` holds.

    Args:
        parents: by name, in the order of the weights.
        soup: what was made of them.
        rounding, seed: it was made with.
        checks: results to be kept beside it, such as held-out losses.
    """
    plain = not isinstance(weights, Mapping)
    return {
        "format": 1,
        "parents": [{"name": name, "sha256": digest(model)} for name, model in parents.items()],
        "weights": [float(w) for w in weights]
        if plain
        else {group: [float(w) for w in row] for group, row in weights.items()},
        "alpha": float(weights[0]) if plain and len(weights) == 2 else None,
        "compute": "float32",
        "dtype": str(next(soup.parameters()).dtype).removeprefix("torch."),
        "rounding": rounding,
        "seed": seed if rounding == "stochastic" else None,
        "sha256": digest(soup),
        "checks": dict(checks or {}),
    }


def save(
    folder: str | Path, soup: nn.Module, entry: Mapping[str, Any], tokenizer: Any = None
) -> Path:
    """Writes the model, its tokenizer and `soup.json` beside the place, then renames.

    Raises:
        ValueError: there is something at `folder`.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"folder: expected a place where nothing is yet, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    soup.save_pretrained(beside)
    if tokenizer is not None:
        tokenizer.save_pretrained(beside)
    write_json(beside / RECORD, entry)
    os.replace(beside, folder)
    return folder


def read_record(folder: str | Path) -> dict[str, Any]:
    """`soup.json` of a folder.

    Raises:
        ValueError: there is none, or one of another format.
    """
    path = Path(folder) / RECORD
    if not path.exists():
        raise ValueError(f"folder: expected {RECORD} in {folder}, got none")
    entry = read_json(path)
    if entry.get("format") != 1:
        raise ValueError(f"{path}: expected format 1, got {entry.get('format')}")
    return entry


def verify(entry: Mapping[str, Any], soup: nn.Module, parents: Sequence[nn.Module] = ()) -> None:
    """Checks that a model is the soup of a record, and, where given, that these are its parents.

    Raises:
        ValueError: another model; the sentence names it.
    """
    expected = [("the soup", soup, entry["sha256"])]
    expected += [
        (known["name"], model, known["sha256"])
        for model, known in zip(parents, entry["parents"], strict=False)
    ]
    for who, model, known in expected:
        found = digest(model)
        if found != known:
            raise ValueError(
                f"expected {who} with sha256 {known[:16]}..., got one with {found[:16]}..."
            )
