"""Results of finished stages, so that a second run does only what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_ext.files import write_text


def stage(path: Path, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result kept in `path` if it was made under the same `key`, else that of `make()`, kept.

    Args:
        path: JSON file of the stage.
        key: everything the result depends on, as JSON values.
        make: does the work.
    """
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept["result"]
    result = make()
    write_text(path, json.dumps({"key": key, "result": result}, indent=1) + "\n")
    return result
