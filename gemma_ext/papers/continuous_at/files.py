"""Files of a run: written beside their place and renamed, read without running code."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`; what is written there takes its place if nothing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """A dict of tensors and plain values."""
    with replacing(path) as beside:
        torch.save(dict(state), beside)


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)
