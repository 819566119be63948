"""Prompts with the further columns of their dataset, in an order that depends on the seed alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma_ext.extras import require
from gemma_ext.ppo.rollout import seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB = "hf:"


class Prompts:
    """A dataset of prompts.

    Args:
        source: texts, or rows with a `prompt` (a text, or messages in the chat format) or with
            `input_ids`, and any other columns; a dataset of `datasets` is one. Or where they are,
            as `read_prompts` takes it.
        tokenizer: of the policy.
        max_length: tokens; a longer prompt loses its start. None for no limit.

    Raises:
        ValueError: no prompts, a row without one, rows of different columns, messages for a
            tokenizer without a chat template.
    """

    def __init__(
        self,
        source: str | Path | Iterable[str | Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
    ) -> None:
        rows = read_prompts(source) if isinstance(source, (str, Path)) else list(source)
        self.rows = [{"prompt": row} if isinstance(row, str) else dict(row) for row in rows]
        self.tokenizer, self.max_length = tokenizer, max_length
        self._digest: str | None = None
        if not self.rows:
            raise ValueError("prompts: expected at least one, got none")
        for place, row in enumerate(self.rows):
            if "prompt" not in row and "input_ids" not in row:
                raise ValueError(
                    f"prompts: expected a prompt or input_ids in row {place}, got {list(row)}"
                )
            prompt = row.get("prompt", "")
            if not isinstance(prompt, (str, list)):
                raise ValueError(
                    f"prompts: expected a text or messages in row {place}, got {prompt!r:.40}"
                )
            if isinstance(prompt, list) and not getattr(tokenizer, "chat_template", "its own"):
                raise ValueError(
                    f"prompts: expected texts for a tokenizer without a chat template, got "
                    f"messages in row {place}"
                )
            if row.keys() != self.rows[0].keys():
                raise ValueError(
                    f"prompts: expected the columns {list(self.rows[0])} in row {place}, "
                    f"got {list(row)}"
                )

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """Of all rows and columns, as far as JSON has them."""
        if self._digest is None:
            found = hashlib.blake2b(digest_size=16)
            for row in self.rows:
                text = json.dumps(row, default=_plain)
                found.update(text.encode() + b"\n")
            self._digest = found.hexdigest()
        return self._digest

    def order(self, start: int, count: int, seed: int) -> list[int]:
        """Rows at places start .. start + count of an endless walk that shuffles every round."""
        shuffled: dict[int, list[int]] = {}
        found = []
        for place in range(start, start + count):
            lap, at = divmod(place, len(self))
            if lap not in shuffled:
                stream = torch.Generator().manual_seed(seed_of(seed, "order", lap))
                shuffled[lap] = torch.randperm(len(self), generator=stream).tolist()
            found.append(shuffled[lap][at])
        return found

    def ids(self, row: int) -> list[int]:
        """Token ids of a prompt, ready to be answered.

        Raises:
            ValueError: an empty prompt.
        """
        found = self.rows[row]
        if "input_ids" in found:
            ids = [int(i) for i in found["input_ids"]]
        elif isinstance(found["prompt"], str):
            ids = self.tokenizer(found["prompt"]).input_ids
        else:
            ids = self.tokenizer.apply_chat_template(
                found["prompt"], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        if not ids:
            raise ValueError(f"prompts: expected a token in row {row}, got none")
        return ids if self.max_length is None else ids[-self.max_length :]

    def given(self, row: int) -> Any:
        """The prompt as reward functions get it: a text, or messages."""
        found = self.rows[row]
        if "prompt" in found:
            return found["prompt"]
        return self.tokenizer.decode(self.ids(row), skip_special_tokens=True)

    def columns(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """The other columns of some rows."""
        names = [name for name in self.rows[0] if name not in ("prompt", "input_ids", "completion")]
        return {name: [self.rows[row][name] for row in rows] for name in names}


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


def read_prompts(source: str | Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file, of the lines of a text file, or of hf:NAME[:SPLIT].

    Raises:
        ValueError: no such file, a line that is no object.
        ImportError: datasets is missing.
    """
    if str(source).startswith(_HUB):
        require("a dataset of the hub", "ppo", "datasets")
        import datasets

        name, _, split = str(source).removeprefix(_HUB).partition(":")
        return list(datasets.load_dataset(name, split=split or "train"))
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"prompts: expected a file or hf:NAME, got {source}")
    # not splitlines, which also ends a line at U+2028 and its like, that JSON leaves in texts
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: expected UTF-8 in {path}, got {error}") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix != ".jsonl":
        return [{"prompt": line} for line in lines]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: expected a JSON object, got {line[:40]!r}")
        rows.append(row)
    return rows
