"""Text as rows of tokens of one length."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB, _POCKET = "hf:", "pocket"


def read_texts(source: str | Path) -> Iterator[str]:
    """Documents of a source.

    | source                 | documents                                                |
    |------------------------|----------------------------------------------------------|
    | a .jsonl file          | the field `text` of every line                           |
    | another file           | its paragraphs, as they stand between empty lines        |
    | hf:NAME, hf:NAME:SPLIT | the column `text` of a dataset of `datasets`, streamed   |
    | pocket                 | the pocket's: Python's own standard library              |

    Raises:
        ValueError: no such file, a line without a text.
        ImportError: datasets is missing.
    """
    if str(source).startswith(_HUB):
        require("a dataset of the hub", "sae", "datasets")
        import datasets

        name, _, split = str(source).removeprefix(_HUB).partition(":")
        for row in datasets.load_dataset(name, split=split or "train", streaming=True):
            yield row["text"]
        return
    if str(source) == _POCKET:
        from gemma_ext.pocket import documents

        yield from (document.text for document in documents() if document.split == "train")
        return
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"text: expected a file, hf:NAME or pocket, got {source}")
    with path.open(encoding="utf-8") as lines:
        if path.suffix == ".jsonl":
            yield from _fields(lines, path)
        else:
            yield from _paragraphs(lines)


def pack(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    *,
    tokens: int | None = None,
) -> Tensor:
    """Documents one behind the other, cut into rows that all start with <bos> if there is one.

    Args:
        context: T.
        tokens: take documents until there are so many; None takes all.

    Returns:
        [rows, T] int32.

    Raises:
        ValueError: not a row.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    body = context - len(start)
    rows, rest, total = [], [], 0
    for text in texts:
        rest += tokenizer(text, add_special_tokens=False).input_ids + end
        while len(rest) >= body:
            rows.append(start + rest[:body])
            rest = rest[body:]
            total += context
        if tokens is not None and total >= tokens:
            break
    if not rows:
        raise ValueError(f"text: expected at least {body} tokens, got {len(rest)}")
    return torch.tensor(rows, dtype=torch.int32)


def rows_of(ids: Tensor, context: int, bos: int | None) -> Tensor:
    """A stream of ids [n] as rows [rows, T] int32 that start with `bos`."""
    body = context - (bos is not None)
    count = ids.numel() // body
    if not count:
        raise ValueError(f"text: expected at least {body} tokens, got {ids.numel()}")
    rows = ids[: count * body].view(count, body).int()
    if bos is None:
        return rows
    return torch.cat([torch.full((count, 1), bos, dtype=torch.int32), rows], 1)


def _fields(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: expected an object with a text") from None


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    lines = iter(lines)
    part: list[str] = []
    while block := list(islice(lines, 1024)):
        for line in block:
            if line.strip():
                part.append(line)
            elif part:
                yield "".join(part)
                part = []
    if part:
        yield "".join(part)


def count(text: str) -> int:
    """A number as 500, 20k, 2.5M or 1B.

    Raises:
        ValueError: it is none.
    """
    units: dict[str, float] = {"k": 1e3, "m": 1e6, "b": 1e9}
    unit = units.get(text[-1:].lower())
    digits: str = text[:-1] if unit else text
    try:
        number = float(digits) * (unit or 1)
    except ValueError:
        number = -1
    if not number >= 1 or number != int(number):
        raise ValueError(f"expected a number as 500, 20k or 2.5M, got {text!r}")
    return int(number)
