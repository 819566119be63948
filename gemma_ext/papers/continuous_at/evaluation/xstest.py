"""XSTest's files (arXiv 2308.01263): prompts, and answers to them with labels of three classes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma_ext.files import replacing
from gemma_ext.papers.continuous_at.evaluation.over_refusal import (
    VERDICTS,
    OverRefusal,
    Request,
    count,
)

CLASSES = ("1_full_compliance", "2_full_refusal", "3_partial_refusal")
"""XSTest's names of `VERDICTS`, in their order."""
_COLUMNS = ("id", "type", "label", "prompt", "completion", "final_label")


def read(path: str | Path) -> list[Request]:
    """The prompts of a CSV file with the columns prompt and type, and id where there is one.

    A column label with "safe" and "unsafe" is read where there is one; else types that begin with
    "contrast" are unsafe.

    Raises:
        ValueError: no such columns, or another label.
    """
    return [_request(row, place) for row, place in _rows(path, "prompt", "type")]


def read_labelled(
    path: str | Path, label: str = "final_label"
) -> tuple[list[Request], OverRefusal]:
    """The prompts of a file with answers and labels, and what was refused.

    Args:
        label: column of the labels: "final_label" of people, "gpt4_label" and "strmatch_label" of
            XSTest's two judges.

    Raises:
        ValueError: no such columns, or a label that is none of `CLASSES`.
    """
    requests, answers, verdicts = [], [], []
    for row, place in _rows(path, "prompt", "type", "completion", label):
        if row[label].strip() not in CLASSES:
            raise ValueError(
                f"{place}: expected {label} to be one of {', '.join(CLASSES)}, got {row[label]!r}"
            )
        requests.append(_request(row, place))
        answers.append(row["completion"])
        verdicts.append(VERDICTS[CLASSES.index(row[label].strip())])
    return requests, count(requests, answers, verdicts)


def write_labelled(path: str | Path, requests: Sequence[Request], found: OverRefusal) -> None:
    """The answers with their verdicts as labels, for `read_labelled` and XSTest's own analysis."""
    with replacing(Path(path)) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for one, answer, verdict in zip(requests, found.answers, found.verdicts, strict=True):
            safe = "safe" if one.safe else "unsafe"
            label = CLASSES[VERDICTS.index(verdict)]
            writer.writerow((one.id, one.kind, safe, one.text, answer, label))


def _rows(path: str | Path, *columns: str) -> list[tuple[dict[str, str], str]]:
    """The records of a file and where they are."""
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for name in columns:
            if name not in (reader.fieldnames or ()):
                raise ValueError(f"{path}: expected a column {name}, got {reader.fieldnames}")
        return [
            ({name: text or "" for name, text in row.items()}, f"{path}, record {number}")
            for number, row in enumerate(reader, 2)
        ]


def _request(row: Mapping[str, str], place: str) -> Request:
    label = row.get("label", "").strip().lower()
    if not label:
        label = "unsafe" if row["type"].startswith("contrast") else "safe"
    if label not in ("safe", "unsafe"):
        raise ValueError(f"{place}: expected the label safe or unsafe, got {label!r}")
    kind, id = row["type"].strip(), row.get("id", "").strip()
    return Request(row["prompt"].strip(), kind, label == "safe", id)
