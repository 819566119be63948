"""GENOME+ at test time: the fittest individuals answer together.

Members stand in the order of their validation fitness; no rule sees the reference. Each gives, per
sample, the member whose answer is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from gemma_ext.papers.genome.evaluation import Outcome

Similarity = Callable[[str, str], float]


def majority(answers: Sequence[Sequence[Any]]) -> list[int]:
    """The answer that most members give; among equally many the one whose first member is fittest.

    Args:
        answers: of K members, S each; None does not vote.

    Returns:
        S members, the fittest of those with the answer; 0 where nobody has one.
    """
    chosen = []
    for sample in _samples(answers):
        votes = Counter(answer for answer in sample if answer is not None)
        # Counter keeps the order in which answers first came: that of the members
        winner = max(votes, key=votes.__getitem__) if votes else None
        chosen.append(sample.index(winner))
    return chosen


def centre(answers: Sequence[Sequence[str]], similarity: Similarity | None = None) -> list[int]:
    """The answer with the highest mean similarity to those of the others, the fittest of equals.

    Minimum-risk choice for free text; the release takes BERTScore, the default here is `word_f1`.
    """
    similarity = similarity or word_f1
    chosen = []
    for sample in _samples(answers):
        risk = [
            sum(similarity(mine, other) for at, other in enumerate(sample) if at != who)
            for who, mine in enumerate(sample)
        ]
        chosen.append(risk.index(max(risk)))
    return chosen


def word_f1(a: str, b: str) -> float:
    """Harmonic mean of precision and recall of the words, each as often as it stands."""
    left, right = Counter((a or "").lower().split()), Counter((b or "").lower().split())
    common = sum((left & right).values())
    if common == 0:
        return float(left == right)
    return 2.0 * common / (left.total() + right.total())


def ensemble_score(
    outcomes: Sequence[Outcome], task: str, rule: Callable[[Sequence[Sequence[Any]]], list[int]]
) -> float:
    """Mean score of the answers that `rule` takes.

    Args:
        outcomes: of the members on one split, fittest on validation first.

    Raises:
        ValueError: the task has no answers to vote on.
    """
    if not all(task in outcome.answers for outcome in outcomes) or not outcomes:
        raise ValueError(f"task: expected one whose members give answers, got {task!r}")
    right = [outcome.right[task] for outcome in outcomes]
    chosen = rule([outcome.answers[task] for outcome in outcomes])
    return _mean([right[who][sample] for sample, who in enumerate(chosen)])


def oracle_score(outcomes: Sequence[Outcome], task: str) -> float:
    """The best member of each sample, with the reference at hand: a bound on every vote, and what
    the release reports as the vote on DROP."""
    return _mean([max(scores) for scores in _samples([o.right[task] for o in outcomes])])


def _samples(members: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    return list(zip(*members, strict=True))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
