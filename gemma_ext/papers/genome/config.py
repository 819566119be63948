"""What a run is told: the search's parameters, and which released defects it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from gemma_ext.papers.genome.materialise import RULES

DEFECTS = {
    "stale_fitness": "a moved individual keeps the fitness from before its move",
    "best_is_alias": "the personal best is the individual itself: no cognitive term",
    "decay_per_individual": "lambda decays after each individual, not each generation",
    "draw_once": "the r of the velocity are drawn once per run, not per individual and step",
    "no_rescale": "DARE does not divide by its density",
    "roulette_by_total": "roulette divides by the total fitness: an error where that is 0",
    "lorahub_sign": "LoraHub's regulariser rewards large weights",
    "oracle_vote": "the ensemble is right where any member is",
    "chosen_by_test": "ensemble members and the final individual are chosen by their test score",
}
"""Of the authors' release; what they do to a run."""

COMPAT = {"fixed": frozenset(), "genome": frozenset(DEFECTS)}


_CHOICES = {
    "method": ("genome", "genome+"),
    "start": ("pairs", "experts"),
    "combine_method": RULES,
    "cross_method": RULES,
    "selection": ("tournament", "roulette", "rank", "elite", "random"),
    "parents": ("roulette", "random"),
}
_SHARES = (
    "density",
    "cross_rate",
    "individual_mutation_rate",
    "gene_mutation_rate",
    "elite_percent",
)
_LEAST = {
    "size": 1,
    "capacity": 1,
    "generations": 0,
    "patience": 1,
    "budget": 1,
    "sigma": 0.0,
    "longest": 2,
}


@dataclass(frozen=True)
class Search:
    """Parameters of GENOME and GENOME+; the defaults are those of GENOME's command line.

    Attributes:
        method: "genome" or "genome+": the latter moves individuals first, and selects by roulette.
        start: "pairs" merges random pairs of experts; "experts" takes them as they are.
        size: N, individuals at the start.
        capacity: individuals after a selection, N (or N_max of GENOME+).
        generations: at most.
        patience: generations without a new best until the search ends; None for no such end.
        budget: evaluations of an individual at most; None for no bound.
        combine_method, cross_method: rule of `materialise.RULES` of the start and of children.
        density: share that ties and DARE keep.
        cross_rate: probability that one of floor(|P| / 2) crossovers happens.
        individual_mutation_rate: probability that an individual gets a mutant.
        gene_mutation_rate, sigma: share of its weights that change, and the standard deviation.
        elite_percent: share that survives in any case, between 0 and 1.
        selection, parents: "tournament", "roulette", "rank", "elite" or "random" for the survivors;
            "roulette" or "random" for who is crossed.
        step, step_decay: lambda of x + lambda v, and its factor per generation.
        inertia, cognitive, social, repel: phi of the velocity.
        longest: an individual with more noises and nested genomes than this is re-based on a stored
            copy of itself.
        defects: names of `DEFECTS` to reproduce.
        seed: of every decision.
    """

    method: str = "genome"
    start: str = "pairs"
    size: int = 10
    capacity: int = 10
    generations: int = 50
    patience: int | None = 5
    budget: int | None = None
    combine_method: str = "linear"
    cross_method: str = "linear"
    density: float = 0.7
    cross_rate: float = 0.8
    individual_mutation_rate: float = 0.15
    gene_mutation_rate: float = 0.01
    sigma: float = 0.01
    elite_percent: float = 0.02
    selection: str = "tournament"
    parents: str = "roulette"
    step: float = 0.5
    step_decay: float = 0.95
    inertia: float = 0.2
    cognitive: float = 0.2
    social: float = 0.2
    repel: float = 0.1
    longest: int = 16
    defects: frozenset[str] = frozenset()
    seed: int = 42

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(allowed)
                raise ValueError(f"{name}: expected one of {expected}, got {getattr(self, name)!r}")
        for name in _SHARES:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in self.defects:
            if name not in DEFECTS:
                raise ValueError(f"defects: expected one of {', '.join(DEFECTS)}, got {name!r}")

    @property
    def moves(self) -> bool:
        return self.method == "genome+"

    @property
    def phi(self) -> tuple[float, float, float, float]:
        return self.inertia, self.cognitive, self.social, self.repel


_PLUS = Search(
    method="genome+",
    capacity=20,
    generations=20,
    patience=None,
    individual_mutation_rate=0.3,
    gene_mutation_rate=0.1,
    sigma=0.05,
    elite_percent=0.1,
    selection="roulette",
)
PRESETS = {
    "genome": Search(),
    "genome-script": Search(
        generations=10,
        cross_rate=0.0,
        individual_mutation_rate=0.1,
        gene_mutation_rate=0.1,
        sigma=0.001,
        elite_percent=0.1,
    ),
    "genome+": _PLUS,
    "genome+-script": replace(
        _PLUS,
        capacity=10,
        generations=10,
        cross_rate=0.3,
        individual_mutation_rate=0.0,
        sigma=0.001,
    ),
}
"""The four columns of defaults in the release; which of them the paper used is not known."""


def search_from(values: Mapping[str, Any]) -> Search:
    """A `Search` from plain values: a preset ("preset" or "method" names it) and what differs.

    Raises:
        ValueError: an unknown key or value.
    """
    values = dict(values)
    name = values.pop("preset", values.get("method", "genome"))
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    compat = values.pop("compat", "fixed")
    if compat not in COMPAT:
        raise ValueError(f"compat: expected one of {', '.join(COMPAT)}, got {compat!r}")
    values["defects"] = COMPAT[compat] | frozenset(values.pop("defects", ()))
    known = {field.name for field in fields(Search)}
    for key in values:
        if key not in known:
            raise ValueError(f"search: expected keys of {', '.join(sorted(known))}, got {key!r}")
    return replace(PRESETS[name], **values)
