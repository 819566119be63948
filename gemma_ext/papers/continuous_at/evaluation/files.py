"""JSON that a reader sees all of or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_ext.papers.continuous_at.files import replacing


def write_json(path: str | Path, value: Any) -> None:
    """Writes beside the place and renames; the folder is made."""
    with replacing(Path(path)) as beside:
        text = json.dumps(value, indent=1, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")
