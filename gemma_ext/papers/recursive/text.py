"""Windows of tokens to train on, from text files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Example = dict[str, Tensor]


def text_windows(paths: Sequence[Path], tokenizer: Any, length: int) -> list[Example]:
    """Windows [T] of the texts, one after another, each as <bos> text <eos>.

    Args:
        paths: `.jsonl` files, whose lines have the key "text", or files of one text.
        tokenizer: of transformers.
        length: T.

    Returns:
        what `Trainer` takes: input_ids and labels, int64.

    Raises:
        ValueError: a line without text, or fewer tokens than one window.
    """
    ids: list[int] = []
    ends = [[i] if i is not None else [] for i in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    for text in _texts(paths):
        ids += (
            ends[0] + tokenizer(text, add_special_tokens=False, verbose=False).input_ids + ends[1]
        )
    if len(ids) < length:
        raise ValueError(f"text: expected at least {length} tokens, got {len(ids)}")
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return examples(rows)


def examples(rows: Iterable[Tensor]) -> list[Example]:
    """Windows [T] as `Trainer` takes them."""
    return [{"input_ids": row, "labels": row} for row in rows]


def _texts(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            continue
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield _text_of(line, f"{path}:{number}")


def _text_of(line: str, place: str) -> str:
    try:
        return json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{place}: expected an object with the key text") from None
