"""Files written beside their place and renamed, read without running code."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`; what is written there takes its place if nothing fails.

    It is on the disk before it takes the place, so that a machine that stops leaves one or the
    other, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        _sync(beside)
        os.replace(beside, path)
        with suppress(OSError):  # not every file system syncs a folder
            _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any) -> None:
    with replacing(Path(path)) as beside:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with replacing(path) as beside:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, beside)


def write_pickle(path: Path, value: Mapping[str, Any]) -> None:
    """A dict of tensors and plain values, as torch.load(weights_only=True) reads it."""
    with replacing(path) as beside:
        torch.save(value, beside)


def metric_line(values: Mapping[str, float]) -> str:
    """A line of a file of metrics, where JSON has null for what is no finite number."""
    finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def write_metrics(path: Path, lines: Iterable[Mapping[str, float]]) -> None:
    with replacing(path) as beside:
        beside.write_text("".join(map(metric_line, lines)), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a file of metrics, with nan for null; none without a file, and none of a line
    that a killed run wrote in part.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [{name: math.nan if x is None else x for name, x in line.items()} for line in found]


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: the file is not there, or is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"expected a file {path}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"expected a file {path}")
    return load_file(path)


def read_pickle(path: Path) -> dict[str, Any]:
    """A dict of tensors and plain values; a file that would run code is refused."""
    import pickle

    if not path.is_file():
        raise ValueError(f"expected a file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected tensors and plain values only, got {str(error).splitlines()[0]}"
        ) from None
