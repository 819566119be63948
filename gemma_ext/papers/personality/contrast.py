"""Pairs of answers to one question, one high and one low in a trait."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from gemma_ext.files import replacing
from gemma_ext.lm import LanguageModel, Sampling

TRAITS = ("extraversion", "agreeableness", "neuroticism", "openness", "conscientiousness")
OPPOSITES = {
    "extraversion": "introversion",
    "agreeableness": "disagreeableness",
    "neuroticism": "emotional stability",
    "openness": "closedness to experience",
    "conscientiousness": "low conscientiousness",
}
WRITTEN = Sampling(max_tokens=150, temperature=0.7)  # as the release asks its API
REQUEST = (
    "You are a person of {label}. Answer the question about {topic} in the first person, in two or "
    "three sentences that show it, without naming it.\n\nQuestion: {question}"
)


@dataclass(frozen=True)
class Pair:
    """A row of the contrastive table; the fields are the columns of its CSV form."""

    question: str
    edit_topic: str
    trait_dimension: str
    high_trait_label: str
    high_trait_response: str
    low_trait_label: str
    low_trait_response: str


COLUMNS = tuple(field.name for field in fields(Pair))


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a CSV file.

    Raises:
        ValueError: a column is missing, or a row has an empty answer; with its line.
    """
    with Path(path).open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines)
        missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, lacks {missing}")
        pairs = []
        for row in rows:
            pair = Pair(**{name: row[name] for name in COLUMNS})
            if not pair.high_trait_response or not pair.low_trait_response:
                raise ValueError(
                    f"{path}, line {rows.line_num}: expected two answers, got an empty"
                )
            pairs.append(pair)
    return pairs


def write_pairs(path: str | Path, pairs: Sequence[Pair]) -> None:
    """A CSV file as `read_pairs` reads it."""
    with (
        replacing(Path(path)) as beside,
        beside.open("w", encoding="utf-8", newline="") as lines,
    ):
        rows = csv.DictWriter(lines, COLUMNS)
        rows.writeheader()
        rows.writerows(vars(pair) for pair in pairs)


def from_answers(
    rows: Sequence[Mapping[str, str]],
    lm: LanguageModel,
    *,
    both: bool = True,
    sampling: Sampling = WRITTEN,
) -> list[Pair]:
    """Pairs from the rows of `holistic-ai/personality_manipulation`.

    The release keeps the rows' own answers as the high ones and has a model write the low ones, so
    that the direction between them also holds the difference of two authors. By default one model
    writes both.

    Args:
        rows: Question, Edit Topic, Answer, Target Personality.
        lm: the author.
        both: False takes the rows' answers for the high ones, as released.

    Raises:
        ValueError: an unknown personality.
    """
    kinds = [row["Target Personality"].strip().lower() for row in rows]
    for kind in kinds:
        if kind not in OPPOSITES:
            raise ValueError(f"Target Personality: expected one of {TRAITS}, got {kind!r}")

    def written(labels: Sequence[str]) -> list[str]:
        asked = [
            REQUEST.format(label=label, topic=row["Edit Topic"], question=row["Question"])
            for row, label in zip(rows, labels, strict=True)
        ]
        chats = [[{"role": "user", "content": text}] for text in asked]
        return [completion.text.strip() for completion in lm.generate(chats, sampling)]

    low = written([OPPOSITES[kind] for kind in kinds])
    high = written(kinds) if both else [row["Answer"] for row in rows]
    return [
        Pair(row["Question"], row["Edit Topic"], kind, kind, up, OPPOSITES[kind], down)
        for row, kind, up, down in zip(rows, kinds, high, low, strict=True)
        if up and down
    ]


def length_matched(pairs: Sequence[Pair], ratio: float = 1.5) -> list[Pair]:
    """Pairs whose answers differ in length by no more than a factor: the rest teach a length."""
    if ratio < 1:
        raise ValueError(f"ratio: expected at least 1, got {ratio}")

    def matched(pair: Pair) -> bool:
        high, low = len(pair.high_trait_response.split()), len(pair.low_trait_response.split())
        return max(high, low) <= ratio * min(high, low)

    return [pair for pair in pairs if matched(pair)]
