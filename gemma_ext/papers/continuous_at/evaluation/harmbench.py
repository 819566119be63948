"""HarmBench's files: behaviours (CSV), targets, test cases and completions (JSON)."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_ext.files import replacing, write_json

TestCases = dict[str, list[str]]
"""Prompts of each behaviour, by BehaviorID."""

_CATEGORY = ("FunctionalCategory", "Category")
_COLUMNS = (
    "Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID",
)  # fmt: skip


@dataclass(frozen=True)
class Behavior:
    """Something that a model should not do.

    Attributes:
        id: BehaviorID.
        text: of the request.
        category: functional category, as "standard" or "contextual".
        semantic: semantic category.
        tags: of the behaviour.
        context: text that the request is about; empty for none.
    """

    id: str
    text: str
    category: str = "standard"
    semantic: str = ""
    tags: tuple[str, ...] = ()
    context: str = ""

    @property
    def request(self) -> str:
        """What a user asks, behind its context if there is one."""
        return f"{self.context}\n\n---\n\n{self.text}" if self.context else self.text


@dataclass(frozen=True)
class Completion:
    """What a model answered to a test case.

    Attributes:
        test_case: the prompt.
        generation: the answer.
        label: whether it shows the behaviour; None before a judge has read it.
    """

    test_case: str
    generation: str
    label: bool | None = None


Completions = dict[str, list[Completion]]
"""Of each behaviour, by BehaviorID."""


def read_behaviors(path: str | Path) -> list[Behavior]:
    """The behaviours of a CSV file, in its order.

    Texts and contexts are as they stand there: HarmBench puts them into test cases with the blanks
    around them.

    Raises:
        ValueError: no column Behavior or BehaviorID, an empty or repeated BehaviorID, a behaviour
            about an image.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for name in ("Behavior", "BehaviorID"):
            if name not in (reader.fieldnames or ()):
                raise ValueError(f"{path}: expected a column {name}, got {reader.fieldnames}")
        found = [_behavior(row, path) for row in reader]
    seen: set[str] = set()
    for number, behavior in enumerate(found, 2):
        if not behavior.id or behavior.id in seen:
            raise ValueError(
                f"{path}, record {number}: expected a BehaviorID of its own, got {behavior.id!r}"
            )
        seen.add(behavior.id)
    return found


def _behavior(row: Mapping[str, str | None], path: str | Path) -> Behavior:
    value = {name: (text or "").strip() for name, text in row.items() if name}
    if value.get("ImageFileName"):
        raise ValueError(
            f"{path}, {value['BehaviorID']}: expected a behaviour of text alone, got one about the "
            f"image {value['ImageFileName']}"
        )
    tags = (tag.strip() for tag in value.get("Tags", "").split(","))
    return Behavior(
        value["BehaviorID"],
        row["Behavior"] or "",
        next((value[name] for name in _CATEGORY if value.get(name)), "standard"),
        value.get("SemanticCategory", ""),
        tuple(tag for tag in tags if tag),
        row.get("ContextString") or "",
    )


def write_behaviors(path: str | Path, behaviors: Sequence[Behavior]) -> None:
    """A CSV file that `read_behaviors` and HarmBench read."""
    with replacing(Path(path)) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for b in behaviors:
            writer.writerow((b.text, b.category, b.semantic, ", ".join(b.tags), b.context, b.id))


def read_targets(path: str | Path) -> dict[str, list[str]]:
    """Answers that are sought, by BehaviorID; a file may hold one string or several for each."""
    found = _mapping(path)
    targets = {key: [value] if isinstance(value, str) else value for key, value in found.items()}
    return _strings(path, targets)


def read_test_cases(path: str | Path) -> TestCases:
    """
    Raises:
        ValueError: no object of lists of strings.
    """
    return _strings(path, _mapping(path))


def write_test_cases(path: str | Path, cases: Mapping[str, Sequence[str]]) -> None:
    write_json(path, {key: list(prompts) for key, prompts in cases.items()})


def read_completions(path: str | Path) -> Completions:
    """
    Raises:
        ValueError: no object of lists of records with test_case and generation.
    """
    found: Completions = {}
    for key, records in _mapping(path).items():
        try:
            found[key] = [_completion(record) for record in records]
        except (KeyError, TypeError):
            raise ValueError(
                f"{path}, {key}: expected a list of records with test_case and generation, "
                f"got {records!r:.80}"
            ) from None
    return found


def _completion(record: Mapping[str, Any]) -> Completion:
    label = record.get("label")
    label = None if label in (None, -1) else bool(label)
    return Completion(str(record["test_case"]), str(record["generation"]), label)


def write_completions(path: str | Path, completions: Mapping[str, Sequence[Completion]]) -> None:
    """Labels are 0 and 1; one that is not known is left out."""
    made = {}
    for key, found in completions.items():
        made[key] = []
        for one in found:
            record: dict[str, Any] = {"test_case": one.test_case, "generation": one.generation}
            if one.label is not None:
                record["label"] = int(one.label)
            made[key].append(record)
    write_json(path, made)


def labelled(completions: Completions, labels: Sequence[bool]) -> Completions:
    """The completions with labels in their order, behaviour by behaviour."""
    rest = iter(labels)
    return {
        key: [replace(one, label=bool(next(rest))) for one in found]
        for key, found in completions.items()
    }


def success(completions: Mapping[str, Sequence[Completion]]) -> dict[str, bool]:
    """Whether any completion of each behaviour shows it.

    Raises:
        ValueError: a completion without a label.
    """
    for key, found in completions.items():
        if any(one.label is None for one in found):
            raise ValueError(f"expected a label of every completion, got none of one of {key}")
    return {key: any(one.label for one in found) for key, found in completions.items()}


def _mapping(path: str | Path) -> dict[str, Any]:
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object by BehaviorID, got a {type(found).__name__}")
    return found


def _strings(path: str | Path, found: dict[str, Any]) -> dict[str, list[str]]:
    for key, texts in found.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}, {key}: expected a list of strings, got {texts!r:.80}")
    return found
