"""Files and folders written beside their place and renamed; files read without running code."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`; the file written there takes its place if nothing fails.

    It is on the disk before it takes the place, so that a machine that stops leaves one or the
    other, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, which gets its name if nothing fails, with all files on disk.

    Raises:
        OSError: at the end, if `path` is a folder with something in it, or a file.
    """
    beside = _beside(path)
    beside.mkdir(parents=True)
    try:
        yield beside
        for part in beside.rglob("*"):
            sync(part)
        os.replace(beside, path)
        sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A name that no other process takes, of this machine or another on the same disk."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def sync(path: Path) -> None:
    """Waits until a file is on the disk, or a folder where its file system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not path.is_dir():
            raise


def write_text(path: str | Path, text: str) -> None:
    with replacing(Path(path)) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    from safetensors.torch import save_file

    plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with replacing(path) as beside:
        save_file(plain, beside, metadata)


def write_pickle(path: Path, value: Mapping[str, Any]) -> None:
    """A dict of tensors and plain values, as torch.load(weights_only=True) reads it."""
    with replacing(path) as beside:
        torch.save(value, beside)


def metric_line(values: Mapping[str, float]) -> str:
    """A line of a file of metrics, where JSON has null for what is no finite number."""
    finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def write_metrics(path: Path, lines: Iterable[Mapping[str, float]]) -> None:
    write_text(path, "".join(map(metric_line, lines)))


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
