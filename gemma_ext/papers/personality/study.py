"""The same questions and benchmarks under every manipulation, item by item.

    delta(method, trait, metric) = metric(method, trait) - metric(method, baseline)

within one run: the same model, questions, decoding and random numbers. The paper compares methods
each at its own alignment; `table` keeps alignment beside damage so that they can be read together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gemma_ext.lm import HuggingFaceModel, LanguageModel, Sampling
from gemma_ext.lm.sweep import generate_at
from gemma_ext.ops.sae import Steering
from gemma_ext.papers.personality.calibration import Measure, Trial
from gemma_ext.papers.personality.manipulations import Manipulation
from gemma_ext.papers.personality.paired import Difference, difference, holm
from gemma_ext.papers.personality.stability import Row
from gemma_ext.papers.personality.states import Ask, chat

SAMPLING = Sampling(max_tokens=100, temperature=0.7)  # the release's, for trait questions
Benchmark = Callable[[LanguageModel, Ask], Sequence[float] | Sequence[Sequence[float]]]
"""Scores [items] or [items, samples] of a model that is asked in a certain way."""


@dataclass(frozen=True)
class Judge:
    """Who says what a text shows.

    Attributes:
        traits: the label of each text.
        label: of each trait.
        clean: whether each text is language at all.
    """

    traits: Callable[[Sequence[str]], Sequence[str]]
    label: Mapping[str, str]
    clean: Callable[[Sequence[str]], Sequence[bool]]


@dataclass(frozen=True)
class Answers:
    """What one manipulation did.

    Attributes:
        labels: [questions][samples], as the judge gives them.
        clean: [questions][samples].
        scores: of each benchmark, [items][samples].
    """

    method: str
    trait: str | None
    labels: list[list[str]]
    clean: list[list[bool]]
    scores: Mapping[str, list[list[float]]] = field(default_factory=dict)

    def aligned(self, label: str) -> list[list[float]]:
        """1 where a text shows the label, [questions][samples]."""
        return [[float(found == label) for found in row] for row in self.labels]

    def rate(self, label: str) -> float:
        hits = self.aligned(label)
        return sum(map(sum, hits)) / sum(map(len, hits))

    @property
    def clean_rate(self) -> float:
        return sum(map(sum, self.clean)) / sum(map(len, self.clean))


@dataclass(frozen=True)
class Effect:
    """A manipulation against its method's baseline.

    Attributes:
        alignment: of the share of texts that show the trait.
        clean: share of its texts that are clean.
        benchmarks: by name.
        adjusted: Holm's p of each benchmark over the whole table; None where there is no test.
    """

    method: str
    trait: str
    alignment: Difference
    clean: float
    benchmarks: Mapping[str, Difference]
    adjusted: Mapping[str, float | None]


def answers(
    lm: HuggingFaceModel,
    manipulation: Manipulation,
    questions: Sequence[str],
    judge: Judge,
    *,
    samples: int = 1,
    sampling: Sampling = SAMPLING,
    benchmarks: Mapping[str, Benchmark] | None = None,
) -> Answers:
    """Asks the model under one manipulation."""
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    prompts = [manipulation.ask(question) for question in questions for _ in range(samples)]
    with manipulation.on():
        texts = [completion.text for completion in lm.generate(prompts, sampling)]
        scores = {
            name: [_listed(item) for item in benchmark(lm, manipulation.ask)]
            for name, benchmark in (benchmarks or {}).items()
        }
    return Answers(
        manipulation.method,
        manipulation.trait,
        _grouped(list(judge.traits(texts)), samples),
        _grouped(list(judge.clean(texts)), samples),
        scores,
    )


def effects(found: Sequence[Answers], judge: Judge, *, seed: int = 0) -> list[Effect]:
    """Every manipulation against the baseline of its method.

    Raises:
        ValueError: a method without a baseline.
    """
    baselines = {each.method: each for each in found if each.trait is None}
    rows = []
    for each in found:
        if each.trait is None:
            continue
        if each.method not in baselines:
            raise ValueError(f"found: expected a baseline of {each.method}, got none")
        before, label = baselines[each.method], judge.label[each.trait]
        benchmarks = {
            name: difference(before.scores[name], scores, seed=seed)
            for name, scores in each.scores.items()
        }
        alignment = difference(before.aligned(label), each.aligned(label), seed=seed)
        rows.append((each, alignment, benchmarks))
    tests = [(at, name) for at, (*_, b) in enumerate(rows) for name in b if b[name].p is not None]
    adjusted = dict(zip(tests, holm([rows[at][2][name].p for at, name in tests]), strict=True))
    return [
        Effect(
            each.method,
            each.trait,
            alignment,
            each.clean_rate,
            benchmarks,
            {name: adjusted.get((at, name)) for name in benchmarks},
        )
        for at, (each, alignment, benchmarks) in enumerate(rows)
    ]


def stability_rows(found: Sequence[Effect]) -> list[Row]:
    """For `stability.levels`."""
    return [
        Row(e.method, e.trait, {name: d.mean for name, d in e.benchmarks.items()}) for e in found
    ]


def response(found: Sequence[Answers], judge: Judge, method: str) -> dict[str, dict[str, float]]:
    """Effect on every trait [of the manipulation][on the label], over the method's baseline."""
    (before,) = [each for each in found if each.method == method and each.trait is None]
    return {
        each.trait: {
            trait: each.rate(label) - before.rate(label) for trait, label in judge.label.items()
        }
        for each in found
        if each.method == method and each.trait is not None
    }


def strength_trials(
    lm: HuggingFaceModel,
    layer: int,
    steering: Steering,
    questions: Sequence[str],
    judge: Judge,
    trait: str,
    *,
    ask: Ask = chat,
    site: str = "resid_mid",
    sampling: Sampling = SAMPLING,
) -> Measure:
    """For `calibration.grid`: all strengths in one batch that shares the blocks below.

    Args:
        steering: of strength 1.
        questions: of their own, on which nothing is reported later.
    """

    def measure(strengths: Sequence[float]) -> list[Trial]:
        prompts = [ask(question) for question in questions]
        written = generate_at(
            lm, layer, steering, strengths, prompts, sampling, site=site, common_draws=False
        )
        trials = []
        for strength, row in zip(strengths, written, strict=True):
            texts = [completion.text for completion in row]
            shown = [label == judge.label[trait] for label in judge.traits(texts)]
            clean = judge.clean(texts)
            count = len(texts)
            trials.append(Trial(strength, sum(shown) / count, sum(clean) / count, count))
        return trials

    return measure


def _listed(item: float | Sequence[float]) -> list[float]:
    return [float(item)] if isinstance(item, (int, float)) else [float(score) for score in item]


def _grouped(values: list, size: int) -> list[list]:
    return [values[start : start + size] for start in range(0, len(values), size)]
