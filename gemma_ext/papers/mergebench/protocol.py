"""The protocol: every algorithm is tuned on validation data, then tested once.

    for each seed, each algorithm:
        prepare statistics                          counted as preparation
        for each configuration of its grid:
            merge into one resident model           counted as merging
            score on the validation side            counted as validation
        merge the best again, score on the test side

Nothing is written but results: a configuration costs a merge in memory and an evaluation. Each
outcome is a line of `results.jsonl`; a run that was interrupted goes on behind the last one.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gemma_ext.files import write_json
from gemma_ext.papers.mergebench.scorers import Scorer
from gemma_ext.papers.mergebench.scores import mean, normalised

Config = Mapping[str, float]


@dataclass(frozen=True)
class Pool:
    """One base and its experts.

    Attributes:
        base: the model all experts were fine-tuned from.
        experts: by domain.
        calibration: by domain, batches of token ids [B, T] for methods that look at data.
        embeddings: merge embeddings and head too. The paper's code leaves them at the base's.
    """

    base: nn.Module
    experts: Mapping[str, nn.Module]
    calibration: Mapping[str, Sequence[Tensor]]
    embeddings: bool = False

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """What is merged, by name; tied tensors once."""
        return {
            name: p.detach()
            for name, p in model.named_parameters()
            if self.embeddings or not left_out(name)
        }


def left_out(name: str) -> bool:
    """Whether the paper's code leaves a parameter at the base's value."""
    return "embed" in name.lower() or "lm_head" in name


class Algorithm(Protocol):
    """A merge algorithm with what it is tuned over."""

    name: str
    grid: Sequence[Config]

    def prepare(self, pool: Pool, seed: int) -> Any:
        """Statistics that do not depend on the configuration."""
        ...

    def merge(self, pool: Pool, prepared: Any, config: Config, seed: int) -> dict[str, Tensor]:
        """The merged weights, under the names of `pool.weights`; the pool stays as it is."""
        ...


@dataclass
class Outcome:
    """One algorithm under one seed.

    Attributes:
        config: the configuration that was best on the validation side.
        scores: of the test side, by domain; `normalised` by the expert of the domain.
        retained: of the general tasks, over the base's.
        prepare_seconds, merge_seconds, validate_seconds: of all configurations together; one merge
            and what tuning made of it are separate numbers.
        configurations: how many were tried.
    """

    algorithm: str
    seed: int
    config: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    normalised: dict[str, float] = field(default_factory=dict)
    retained: dict[str, float] = field(default_factory=dict)
    prepare_seconds: float = 0.0
    merge_seconds: float = 0.0
    validate_seconds: float = 0.0
    configurations: int = 0

    @property
    def performance(self) -> float:
        return mean(self.normalised)

    @property
    def retention(self) -> float:
        return mean(self.retained)

    @property
    def seconds(self) -> float:
        return self.prepare_seconds + self.merge_seconds + self.validate_seconds


def run(
    pools: Callable[[int], Pool],
    algorithms: Iterable[Algorithm],
    scorer: Scorer,
    seeds: Sequence[int],
    out: Path,
    report: Callable[[str], None] = lambda line: None,
    setting: Mapping[str, Any] | None = None,
) -> list[Outcome]:
    """Runs the protocol.

    Args:
        pools: the pool of a seed; asked for only where an outcome is missing.
        algorithms: in the order of the table.
        scorer: its domains are the pool's.
        seeds: of experts and of everything random in a merge.
        out: folder of `results.jsonl`.
        report: gets a line per outcome.
        setting: what outcomes depend on beside algorithm and seed, made of what JSON knows.

    Raises:
        ValueError: `out` holds outcomes of another setting, domains of scorer and pool differ, or
            a reference score is not positive.
    """
    out.mkdir(parents=True, exist_ok=True)
    _check_setting(out / "setting.json", dict(setting or {}))
    book = Book(out / "results.jsonl")
    algorithms = list(algorithms)
    for seed in seeds:
        todo = [a for a in algorithms if (a.name, seed) not in book.done]
        if not todo:
            continue
        bench = Bench(pools(seed), scorer, seed)
        for reference in bench.references():
            book.add(reference)
        for algorithm in todo:
            outcome = bench.outcome(algorithm)
            book.add(outcome)
            report(f"seed {seed} {outcome.algorithm}: performance {outcome.performance:.3f}")
    wanted = {(a.name, seed) for a in algorithms for seed in seeds}
    wanted |= {(name, seed) for name in REFERENCES for seed in seeds}
    return [book.done[key] for key in book.done if key in wanted]


REFERENCES = ("base", "experts")
"""Rows that are no merge: the base everywhere, and each expert at home and on general tasks."""


class Bench:
    """A pool under a scorer: references once, then one algorithm after another."""

    def __init__(self, pool: Pool, scorer: Scorer, seed: int) -> None:
        if set(pool.experts) != set(scorer.domains):
            raise ValueError(
                f"pool: expected an expert of each of {sorted(scorer.domains)}, "
                f"got {sorted(pool.experts)}"
            )
        self.pool, self.scorer, self.seed = pool, scorer, seed
        self.own = {side: self._own(side) for side in ("validation", "test")}
        self.base = scorer.general(pool.base)

    def references(self) -> list[Outcome]:
        base = self._tested(Outcome("base", self.seed), self.pool.base)
        kept = [normalised(self.scorer.general(m), self.base) for m in self.pool.experts.values()]
        experts = Outcome(
            "experts",
            self.seed,
            scores=self.own["test"],
            normalised=normalised(self.own["test"], self.own["test"]),
            retained={task: sum(k[task] for k in kept) / len(kept) for task in self.base},
        )
        return [base, experts]

    def outcome(self, algorithm: Algorithm) -> Outcome:
        """Tunes on the validation side and tests the best once."""
        done = Outcome(algorithm.name, self.seed)
        start = time.perf_counter()
        prepared = algorithm.prepare(self.pool, self.seed)
        done.prepare_seconds = time.perf_counter() - start
        done.configurations = len(algorithm.grid)
        if not algorithm.grid:
            raise ValueError(f"grid: expected {algorithm.name} to have a configuration, got none")
        resident = Resident(self.pool.base)
        best = -math.inf
        for config in algorithm.grid:
            start = time.perf_counter()
            resident.set(algorithm.merge(self.pool, prepared, config, self.seed))
            merged = time.perf_counter()
            done.merge_seconds += merged - start
            value = self._validated(resident.model) if len(algorithm.grid) > 1 else 0.0
            done.validate_seconds += time.perf_counter() - merged
            if value > best:
                best, done.config = value, dict(config)
        resident.set(algorithm.merge(self.pool, prepared, done.config, self.seed))
        return self._tested(done, resident.model)

    def _validated(self, model: nn.Module) -> float:
        return mean(normalised(self.scorer.score(model, "validation"), self.own["validation"]))

    def _tested(self, outcome: Outcome, model: nn.Module) -> Outcome:
        outcome.scores = self.scorer.score(model, "test")
        outcome.normalised = normalised(outcome.scores, self.own["test"])
        outcome.retained = normalised(self.scorer.general(model), self.base)
        return outcome

    def _own(self, side: str) -> dict[str, float]:
        """The score of each expert in its own domain."""
        scored = {d: self.scorer.score(m, side, [d]) for d, m in self.pool.experts.items()}
        return {domain: scores[domain] for domain, scores in scored.items()}


def _check_setting(path: Path, setting: dict[str, Any]) -> None:
    """Writes the setting beside and renames, or compares it with the one that is there."""
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        for key in sorted(held | setting):
            if held.get(key) != setting.get(key):
                raise ValueError(
                    f"out: expected {key} {held.get(key)!r} as in {path}, got {setting.get(key)!r}"
                )
        return
    write_json(path, setting)


class Resident:
    """A copy of a model whose weights are set over and over: no merge is written to disk."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.weights = dict(self.model.named_parameters())

    @torch.no_grad()
    def set(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            self.weights[name].copy_(value)


class Book:
    """Outcomes in a file of one JSON line each; a line that was cut off is forgotten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[tuple[str, int], Outcome] = {}
        whole = ""
        for line in path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []:
            if line.endswith("\n"):
                self._remember(Outcome(**json.loads(line)))
                whole += line
        path.write_text(whole, encoding="utf-8")

    def add(self, outcome: Outcome) -> None:
        if (outcome.algorithm, outcome.seed) in self.done:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        self._remember(outcome)

    def _remember(self, outcome: Outcome) -> None:
        self.done[outcome.algorithm, outcome.seed] = outcome
