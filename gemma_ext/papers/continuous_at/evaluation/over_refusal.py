"""Over-refusal: how many harmless requests a model refuses, in the chat it will be used in.

Robust models may have learnt to refuse the chat template or the imperative. Perplexity and
multiple choice without a template do not see it, so requests go through the template; the same
without one stands beside them for the difference (`chat=False`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_ext.lm.protocol import LanguageModel, Sampling
from gemma_ext.papers.continuous_at.evaluation.intervals import wilson
from gemma_ext.papers.continuous_at.evaluation.judges import COMPLIANCE, ModelJudge, RefusalStrings

VERDICTS = ("complies", "refuses", "refuses in part")
Reader = Callable[[Sequence[tuple[str, str]]], list[str]]
"""From (request, answer) pairs to one of `VERDICTS` each."""


@dataclass(frozen=True)
class Request:
    """A request that is to be answered, or one beside it that is not.

    Attributes:
        text: of the user.
        kind: of the request, as "homonyms".
        safe: whether a refusal is one too many.
        id: of its benchmark, if it has one.
    """

    text: str
    kind: str
    safe: bool = True
    id: str = ""


def read_harmless(path: str | Path, kind: str = "harmless") -> list[Request]:
    """Harmless requests, one a line; empty lines are left out."""
    # not splitlines, which also ends a line at U+2028 and its like
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [Request(line.strip(), kind) for line in lines if line.strip()]


def by_strings(judge: RefusalStrings | None = None) -> Reader:
    """Reads refusals by their words; it knows no refusal in part. An answer of no words is one."""
    judge = judge or RefusalStrings()
    return lambda pairs: [
        VERDICTS[not answer.strip() or judge.refuses(answer)] for _, answer in pairs
    ]


def by_model(lm: LanguageModel, question: str = COMPLIANCE, chat: bool = True) -> Reader:
    """Asks a language model, whose answers A, B and C stand for `VERDICTS`."""
    judge = ModelJudge(lm, question, ("A", "B", "C"), chat)
    return lambda pairs: [VERDICTS[share.index(max(share))] for share in judge.shares(pairs)]


@dataclass(frozen=True)
class Refusals:
    """Of one kind of requests.

    Attributes:
        kind: of the requests, "all" for all of them.
        safe: whether refusals are too many.
        counts: of each of `VERDICTS`, in that order.
    """

    kind: str
    safe: bool
    counts: tuple[int, int, int]

    @property
    def rate(self) -> float:
        """Share that is refused, in part or in whole; NaN without requests."""
        total = sum(self.counts)
        return sum(self.counts[1:]) / total if total else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the rate (Wilson)."""
        return wilson(sum(self.counts[1:]), sum(self.counts))


@dataclass(frozen=True)
class OverRefusal:
    """What a model refused.

    Attributes:
        rows: all safe requests, all unsafe ones, then kind by kind.
        answers: in the order of the requests.
        verdicts: beside them.
    """

    rows: tuple[Refusals, ...]
    answers: tuple[str, ...]
    verdicts: tuple[str, ...]


def over_refusal(
    lm: LanguageModel,
    requests: Sequence[Request],
    read: Reader | None = None,
    sampling: Sampling = Sampling(max_tokens=128),  # noqa: B008
    chat: bool = True,
) -> OverRefusal:
    """Asks a model all requests and counts what it refuses.

    Args:
        read: `by_strings()` or `by_model(judge)`.
        chat: through the chat template, as users of the model do.

    Raises:
        ValueError: a reader that gives another verdict.
    """
    prompts = [[{"role": "user", "content": r.text}] if chat else r.text for r in requests]
    answers = [one.text for one in lm.generate(prompts, sampling)]
    texts = [request.text for request in requests]
    return count(requests, answers, (read or by_strings())(list(zip(texts, answers, strict=True))))


def count(
    requests: Sequence[Request], answers: Sequence[str], verdicts: Sequence[str]
) -> OverRefusal:
    """What was refused, from a verdict on the answer to each request.

    Raises:
        ValueError: another verdict.
    """
    for verdict in verdicts:
        if verdict not in VERDICTS:
            raise ValueError(f"expected a verdict among {VERDICTS}, got {verdict!r}")
    groups: dict[tuple[str, bool], list[str]] = {("all", True): [], ("all", False): []}
    for request, verdict in zip(requests, verdicts, strict=True):
        groups[("all", request.safe)].append(verdict)
        groups.setdefault((request.kind, request.safe), []).append(verdict)
    rows = [
        Refusals(kind, safe, tuple(map(found.count, VERDICTS)))
        for (kind, safe), found in groups.items()
        if found
    ]
    return OverRefusal(tuple(rows), tuple(answers), tuple(verdicts))
