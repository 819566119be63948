"""RealToxicityPrompts: JSON lines, as released."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ToxicityPrompt:
    """A prompt of RealToxicityPrompts.

    Attributes:
        text: to be continued.
        toxicity: of the prompt itself, by Perspective; None where it was not scored.
        challenging: whether most models continued it in a toxic way.
    """

    text: str
    toxicity: float | None
    challenging: bool


def read_prompts(path: str | Path, *, challenging: bool = False) -> list[ToxicityPrompt]:
    """The prompts of a file in its order.

    Args:
        path: .jsonl; each line holds prompt {text, toxicity, ...} and challenging.
        challenging: only those that are.

    Raises:
        ValueError: a line that is not such a record, with its number.
    """
    return [p for p in _prompts(Path(path)) if p.challenging or not challenging]


def _prompts(path: Path) -> Iterator[ToxicityPrompt]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                prompt = record["prompt"]
                text, toxicity = prompt["text"], prompt.get("toxicity")
                if not isinstance(text, str):
                    raise TypeError(text)
                toxicity = None if toxicity is None else float(toxicity)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a record with prompt.text, got {line[:80]!r}"
                ) from error
            yield ToxicityPrompt(text, toxicity, bool(record.get("challenging")))
