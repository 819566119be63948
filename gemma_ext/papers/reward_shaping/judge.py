"""Win rate against another model by a language model that reads both answers, in both orders."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gemma_ext.lm import LanguageModel, Sampling

# "Better: Answer B" is B, and the first letters of Answer or Both are no verdict
VERDICT = re.compile(r"Better:\W*(?:(?:Answer|Assistant)\s+)?(A|B|N)(?:either|one)?\b")
SAMPLING = Sampling(max_tokens=1024, temperature=0.1)
TEMPLATE = """Two assistants answered the same request. Weigh how helpful, correct, harmless and \
well written each answer is; a longer answer is not better for its length.

Request:
{prompt}

Answer A:
{a}

Answer B:
{b}

Give your reasons, then a last line of the form "Better: X", where X is A, B, or N if neither is \
better."""


@dataclass(frozen=True)
class WinRate:
    """Of a policy against an opponent.

    Attributes:
        rate: mean over prompts of (win 1, tie 1/2, loss 0), each the mean of both orders.
        error: its standard error over prompts; NaN of one.
        prompts: judged in both orders.
        unread: prompts left out, as a verdict could not be read.
        first: how often the answer that stands first won, ties half: 1/2 without position bias.
        points: of each prompt, None where it was left out.
    """

    rate: float
    error: float
    prompts: int
    unread: int
    first: float
    points: tuple[float | None, ...]


def verdict(text: str) -> str | None:
    """A, B or N of the last verdict in the text, None without one."""
    found = VERDICT.findall(text)
    return found[-1] if found else None


def win_rate(
    judge: LanguageModel,
    prompts: Sequence[str],
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    template: str = TEMPLATE,
    sampling: Sampling = SAMPLING,
) -> WinRate:
    """Judges every pair twice, each answer once in the first place.

    Args:
        template: with {prompt}, {a} and {b}; it asks for a line "Better: A", "B" or "N".

    Raises:
        ValueError: numbers of answers differ, or no verdict could be read at all.
    """
    if not len(prompts) == len(ours) == len(theirs):
        raise ValueError(
            f"answers: expected {len(prompts)} of both, got {len(ours)} and {len(theirs)}"
        )
    rows = list(zip(prompts, ours, theirs, strict=True))
    asked = [_filled(template, p, a, b) for p, a, b in rows]
    asked += [_filled(template, p, b, a) for p, a, b in rows]
    read = [verdict(answer.text) for answer in judge.generate(asked, sampling)]
    points: list[float | None] = []
    firsts = []
    for ahead, behind in zip(read[: len(rows)], read[len(rows) :], strict=True):
        if ahead is None or behind is None:
            points.append(None)
            continue
        firsts += [_points(ahead), _points(behind)]
        points.append((_points(ahead) + 1 - _points(behind)) / 2)
    judged = [value for value in points if value is not None]
    if not judged:
        raise ValueError(f"judge: expected verdicts such as 'Better: A', got none of {len(asked)}")
    mean = sum(judged) / len(judged)
    squares = sum((value - mean) ** 2 for value in judged)
    count = len(judged)
    return WinRate(
        rate=mean,
        error=math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan,
        prompts=count,
        unread=len(points) - count,
        first=sum(firsts) / len(firsts),
        points=tuple(points),
    )


def _points(letter: str) -> float:
    """Of the answer in the first place."""
    return {"A": 1.0, "N": 0.5, "B": 0.0}[letter]


def _filled(template: str, prompt: str, a: str, b: str) -> str:
    # not str.format: answers may have braces
    parts = {"{prompt}": prompt, "{a}": a, "{b}": b}
    return re.sub("|".join(map(re.escape, parts)), lambda match: parts[match.group()], template)
