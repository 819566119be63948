"""Labelled samples of new tasks, and the default scorer over the language-model protocol.

A task is a JSON-lines file; its kind says what a line holds and what its score is, larger better.

| kind | a line | score | answers, for votes |
|---|---|---|---|
| choice | prompt, options, answer (text or index) | accuracy of the likeliest option | option |
| generate | prompt, answer | what is written after "Answer:", exact match or word F1 | it |
| likelihood | text, or prompt and continuation | exp of the mean log-probability of a token | - |
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_ext.lm import LanguageModel, Sampling
from gemma_ext.papers.genome.draws import draws
from gemma_ext.papers.genome.ensemble import word_f1
from gemma_ext.papers.genome.evaluation import Outcome

SAMPLES = 200  # of a new task, in the paper
SPLITS = ("validation", "test")
METRICS = ("exact", "f1")
_MARK = re.compile(r".*answer\s*:", re.IGNORECASE | re.DOTALL)
_KEYS = {"choice": ("prompt", "options", "answer"), "generate": ("prompt", "answer")}


@dataclass(frozen=True)
class Task:
    """Samples of one kind, for selection (`validation`) and for the report alone (`test`).

    Attributes:
        name: in tables.
        kind: "choice", "generate" or "likelihood".
        validation, test: lines as read; no line is in both.
        weight: in the fitness.
        normalise: of "choice": the unit of length, as in `gemma_ext.lm.Choice.values`.
        metric: of "generate": "exact" or "f1".
        sampling: of "generate"; the release's by default.

    Raises:
        ValueError: an unknown kind or metric, a line without what its kind needs, or a line that is
            in both splits.
    """

    name: str
    kind: str
    validation: Sequence[Mapping[str, Any]]
    test: Sequence[Mapping[str, Any]] = ()
    weight: float = 1.0
    normalise: str | None = None
    metric: str = "exact"
    sampling: Sampling = field(
        default_factory=lambda: Sampling(max_tokens=1024, temperature=0.2, top_p=0.75, seed=42)
    )

    def __post_init__(self) -> None:
        if self.kind not in (*_KEYS, "likelihood"):
            kinds = ", ".join((*_KEYS, "likelihood"))
            raise ValueError(f"kind: expected one of {kinds}, got {self.kind!r}")
        if self.metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {self.metric!r}")
        for split in SPLITS:
            for at, line in enumerate(getattr(self, split)):
                _check(self, f"{self.name}, {split} sample {at}", line)
        if not self.validation:
            raise ValueError(f"{self.name}: expected validation samples, got none")
        both = {_digest(line) for line in self.validation} & {_digest(line) for line in self.test}
        if both:
            raise ValueError(f"{self.name}: expected no sample in both splits, got {len(both)}")

    @property
    def digest(self) -> str:
        """Of everything that its scores depend on beside the model."""
        return _digest({name: str(value) for name, value in vars(self).items()})


def load_task(
    name: str,
    file: str | Path,
    kind: str,
    *,
    test: str | Path | None = None,
    samples: int = SAMPLES,
    seed: int = 42,
    **options: Any,
) -> Task:
    """A task from JSON lines.

    Args:
        file: `samples` lines drawn from it by `seed` are for validation.
        test: lines of the test split; None takes the rest of `file`.
        options: of `Task`.

    Raises:
        ValueError: fewer than 1 sample wanted, or a line that is no JSON object; it is named.
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    lines = _read(Path(file))
    order = draws(seed, "samples", name).permutation(len(lines))
    mixed = [lines[at] for at in order]
    rest = mixed[samples:] if test is None else _read(Path(test))
    return Task(name, kind, mixed[:samples], rest, **options)


def score(lm: LanguageModel, tasks: Sequence[Task], split: str = "validation") -> Outcome:
    """Scores of a model on a split of each task; NaN where the split is empty.

    Raises:
        ValueError: another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    scores: dict[str, float] = {}
    answers: dict[str, list[Any]] = {}
    right: dict[str, list[float]] = {}
    for task in tasks:
        lines = getattr(task, split)
        if task.kind == "likelihood":
            scores[task.name] = _likelihood(lm, lines)
            continue
        answers[task.name], right[task.name] = _ANSWERED[task.kind](lm, task, lines)
        scores[task.name] = sum(right[task.name]) / len(lines) if lines else math.nan
    return Outcome(scores, answers, right)


def answer_in(text: str) -> str:
    """What stands after the last "Answer:" (the first line of it), else the whole text."""
    marked = _MARK.match(text)
    text = text[marked.end() :] if marked else text
    text = text.strip()
    return (text.splitlines()[0] if text else text).strip().rstrip(".")


def _choice(lm: LanguageModel, task: Task, lines: Sequence[Mapping[str, Any]]):
    found = lm.choices([x["prompt"] for x in lines], [x["options"] for x in lines])
    answers = [choice.options[choice.best(task.normalise)] for choice in found]
    wanted = [_option(x) for x in lines]
    return answers, [float(a == w) for a, w in zip(answers, wanted, strict=True)]


def _generate(lm: LanguageModel, task: Task, lines: Sequence[Mapping[str, Any]]):
    written = lm.generate([x["prompt"] for x in lines], task.sampling)
    answers = [answer_in(completion.text) or None for completion in written]
    wanted = [answer_in(str(x["answer"])) for x in lines]
    same = word_f1 if task.metric == "f1" else _exact
    return answers, [same(a or "", w) for a, w in zip(answers, wanted, strict=True)]


_ANSWERED: dict[str, Callable] = {"choice": _choice, "generate": _generate}


def _likelihood(lm: LanguageModel, lines: Sequence[Mapping[str, Any]]) -> float:
    pairs = [x for x in lines if "text" not in x]
    known = lm.perplexity([x["text"] for x in lines if "text" in x])
    scored = lm.logprobs([x["prompt"] for x in pairs], [x["continuation"] for x in pairs])
    logprob = sum(x.logprob for x in known) + sum(x.logprob for x in scored)
    tokens = sum(x.tokens for x in known) + sum(len(x.token_logprobs) for x in scored)
    return math.exp(logprob / tokens) if tokens else math.nan


def _exact(a: str, b: str) -> float:
    return float(a.casefold() == b.casefold())


def _option(line: Mapping[str, Any]) -> str:
    answer = line["answer"]
    return line["options"][answer] if isinstance(answer, int) else answer


def _check(task: Task, where: str, line: Mapping[str, Any]) -> None:
    if task.kind == "likelihood":
        if "text" not in line and not {"prompt", "continuation"} <= set(line):
            raise ValueError(
                f"{where}: expected text, or prompt and continuation, got {list(line)}"
            )
        return
    for key in _KEYS[task.kind]:
        if key not in line:
            raise ValueError(f"{where}: expected the key {key!r}, got {list(line)}")
    if task.kind == "choice":
        options, answer = line["options"], line["answer"]
        known = answer in range(len(options)) if isinstance(answer, int) else answer in options
        if not known:
            raise ValueError(
                f"{where}: expected answer to be an option or its index, got {answer!r}"
            )


def _read(path: Path) -> list[dict[str, Any]]:
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}")
        lines.append(record)
    return lines


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
