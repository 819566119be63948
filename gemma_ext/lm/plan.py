"""What is run together: equal inputs once, long beside long, options behind their one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gemma_ext.lm.text import Job, shared_length

_WORTHWHILE = 16  # tokens that a second pass has to save before it pays


class Mark(NamedTuple):
    """`targets` of job `job` are predicted at inputs `start`, `start + 1`, ... of a row."""

    job: int
    start: int
    targets: list[int]


@dataclass
class Row:
    """One sequence of inputs and what is read off it."""

    inputs: list[int]
    marks: list[Mark] = field(default_factory=list)


@dataclass
class Family:
    """Rows whose inputs all follow `prefix`, which is run once; marks count from behind it."""

    prefix: list[int]
    rows: list[Row]


def plan(jobs: Sequence[Job], places: Sequence[int], window: int, share: bool) -> list[Family]:
    """Families of the jobs at `places`, one for the jobs of the same context where that pays.

    Args:
        window: inputs that the model takes; a longer sequence loses its start.
        share: False gives every row a family of its own, without a prefix.

    Raises:
        ValueError: targets that fill more than the window.
    """
    groups: dict[tuple[int, ...], list[Row]] = {}
    for place in places:
        groups.setdefault(tuple(jobs[place].context), []).append(row_of(jobs, place, window))
    return [made for rows in groups.values() for made in _families(_merged(rows), share)]


def row_of(jobs: Sequence[Job], place: int, window: int) -> Row:
    """The inputs of a decoder alone that predict the targets of a job."""
    context, targets = jobs[place]
    check_targets(targets, window)
    tokens = (context + targets)[-(window + 1) :]
    return Row(tokens[:-1], [Mark(place, len(tokens) - len(targets) - 1, targets)])


def check_targets(targets: Sequence[int], window: int) -> None:
    """Raise ValueError unless a continuation fits into the window."""
    if len(targets) > window:
        raise ValueError(
            f"expected continuations of at most {window} tokens, got one of {len(targets)}"
        )


def buckets(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places in groups of similar lengths, longest first.

    A group padded to its longest has at most `budget` tokens, or it has one member.
    """
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if group and (len(group) + 1) * lengths[group[0]] > budget:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def _merged(rows: list[Row]) -> list[Row]:
    """The rows without those that another starts with, which takes over their marks."""
    kept: list[Row] = []
    # in this order the start of a row comes behind all that begin with it
    for row in sorted(rows, key=lambda row: row.inputs, reverse=True):
        if kept and kept[-1].inputs[: len(row.inputs)] == row.inputs:
            kept[-1].marks.extend(row.marks)
        else:
            kept.append(row)
    return kept


def _families(rows: list[Row], share: bool) -> list[Family]:
    # what predicts the first target is run with every row, because its output is read
    first = min(mark.start for row in rows for mark in row.marks)
    shared = min(first, shared_length([row.inputs for row in rows]))
    if not share or shared * (len(rows) - 1) < _WORTHWHILE:
        return [Family([], [row]) for row in rows]
    followers = [
        Row(
            row.inputs[shared:],
            [mark._replace(start=mark.start - shared) for mark in row.marks],
        )
        for row in rows
    ]
    return [Family(rows[0].inputs[:shared], followers)]
