"""Where trained pockets live, and how their files are kept whole.

A folder is filled beside its place and renamed when it is complete; `manifest.json`, written last,
holds the sha256 of every other file and is checked on load.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from gemma_ext.files import write_text

MANIFEST = "manifest.json"


def cache_dir() -> Path:
    """$GEMMA_EXT_CACHE, else gemma_ext below $XDG_CACHE_HOME, else ~/.cache/gemma_ext."""
    own = os.environ.get("GEMMA_EXT_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "gemma_ext"


def write_manifest(folder: Path, **fields: Any) -> None:
    """Records the sha256 of every file in `folder`, with further fields for a reader."""
    files = {name: _sha256(folder / name) for name in _names(folder)}
    write_text(folder / MANIFEST, json.dumps({**fields, "files": files}, indent=2) + "\n")


def verify_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are all as they were written.

    Raises:
        ValueError: a file is missing, was added or has changed; the message names it.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    remedy = f"remove {folder} to have it made again"
    expected, present = set(manifest["files"]), set(_names(folder))
    if expected != present:
        odd = sorted(expected ^ present)[0]
        raise ValueError(f"{folder / odd}: expected exactly the files of {MANIFEST}; {remedy}")
    for name, digest in manifest["files"].items():
        found = _sha256(folder / name)
        if found != digest:
            raise ValueError(
                f"{folder / name}: expected sha256 {digest[:16]}..., got {found[:16]}...; {remedy}"
            )
    return manifest


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p.relative_to(folder).as_posix() for p in files if p.name != MANIFEST)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
