"""Finished pieces of a study in one JSON file: a run that was interrupted computes none twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_ext.files import write_text


class Kept:
    """Pieces by name.

    Args:
        path: of the file; its folder is made.
        identity: what every piece depends on. Pieces of another identity are forgotten.

    Example:
        >>> kept = Kept(out / "results.json", {"model": "pocket", "steps": 500})
        >>> row = kept("layer 3", lambda: measure(3))
    """

    def __init__(self, path: Path, identity: Any) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self.pieces: dict[str, Any] = {}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["identity"] == self.identity:
                self.pieces = found["pieces"]

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        """The piece of that name, made and written if it is not there; as JSON gives it back."""
        if name not in self.pieces:
            self.pieces[name] = json.loads(json.dumps(make()))
            text = json.dumps({"identity": self.identity, "pieces": self.pieces}, indent=1)
            write_text(self.path, text + "\n")
        return self.pieces[name]
