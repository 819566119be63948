"""What an individual is: a recipe over a pool of experts and seeds, never a copy of weights.

    value(g) = base + rule_i(w_i (s_i - base)) + sum_j sigma_j m_j e_j,   base = 0 without one

A source s_i is an expert of the pool or another genome, taken as a finished tensor. Under the rule
"linear" crossover, mutation and succession are algebra on the coefficients w and sigma: a child of
any depth stays one weighted sum over the experts and the noises of its ancestors, and is written by
one pass. Only the other rules, and sums with too many noises, nest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Union

Source = Union[int, "Genome"]


@dataclass(frozen=True, order=True)
class Noise:
    """m sigma e with m ~ Bernoulli(rate) and e ~ N(0, 1) per element, both drawn by `seed`."""

    seed: int
    rate: float
    sigma: float


@dataclass(frozen=True, eq=False)
class Genome:
    """A recipe; equal recipes have equal `key`s.

    Attributes:
        terms: (source, weight), in the order of `source_key`.
        noises: added after the rule.
        rule: one of `materialise.RULES`.
        density: share kept by the rules that drop elements.
        rescale: whether DARE divides by the density.
        seed: of what the rule draws.
    """

    terms: tuple[tuple[Source, float], ...]
    noises: tuple[Noise, ...] = ()
    rule: str = "linear"
    density: float = 1.0
    rescale: bool = True
    seed: int = 0

    @cached_property
    def key(self) -> str:
        """sha256 of the recipe's content: with the pool, it determines every weight."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:32]

    def record(self) -> dict[str, Any]:
        """JSON form; nested genomes by their keys."""
        return {
            "terms": [[source_key(s), w] for s, w in self.terms],
            "noises": [asdict(noise) for noise in self.noises],
            "rule": self.rule,
            "density": self.density,
            "rescale": self.rescale,
            "seed": self.seed,
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Genome) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def length(self) -> int:
        """Noises and nested genomes: what materialising takes beyond one sum over the pool."""
        return len(self.noises) + len(self.parents)

    @property
    def parents(self) -> list[Genome]:
        """The genomes this one needs finished."""
        return [source for source, _ in self.terms if isinstance(source, Genome)]


def expert(index: int) -> Genome:
    """Expert `index` of the pool as it is."""
    return Genome(((index, 1.0),))


def source_key(source: Source) -> int | str:
    return source if isinstance(source, int) else source.key


def finished(genome: Genome) -> Source:
    """The genome as one source: the expert itself where it is nothing else."""
    plain = genome.rule == "linear" and not genome.noises and len(genome.terms) == 1
    return genome.terms[0][0] if plain and genome.terms[0][1] == 1.0 else genome


def rebased(genome: Genome) -> Genome:
    """The same values with one term."""
    return Genome(((finished(genome), 1.0),))


def applied(rule: str, parts: Iterable[tuple[Genome, float]], **options: Any) -> Genome:
    """`rule` over finished genomes and their weights."""
    return Genome(_ordered({finished(g): w for g, w in parts}), rule=rule, **options)


def mix(parts: Iterable[tuple[Genome, float]], longest: int | None = None) -> Genome:
    """sum_i c_i g_i as one sum.

    Args:
        parts: (genome, coefficient).
        longest: a result with more noises and nested genomes than this is re-based: from then on
            it is one finished source.
    """
    parts = [(genome, c) for genome, c in parts if c != 0.0]
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    terms: dict[Source, float] = {}
    noises: dict[tuple[int, float], float] = {}
    for genome, c in parts:
        genome = genome if genome.rule == "linear" else rebased(genome)
        for source, w in genome.terms:
            terms[source] = terms.get(source, 0.0) + c * w
        for noise in genome.noises:
            place = (noise.seed, noise.rate)
            noises[place] = noises.get(place, 0.0) + c * noise.sigma
    made = Genome(
        _ordered({source: w for source, w in terms.items() if w != 0.0}),
        tuple(sorted(Noise(*place, s) for place, s in noises.items() if s != 0.0)),
    )
    return made if longest is None or made.length <= longest else rebased(made)


def with_noise(genome: Genome, noise: Noise, longest: int | None = None) -> Genome:
    """The genome plus a noise; itself where the noise is none."""
    if noise.rate <= 0.0 or noise.sigma == 0.0:
        return genome
    if longest is not None and genome.length >= longest:
        genome = rebased(genome)
    return replace(genome, noises=tuple(sorted((*genome.noises, noise))))


def to_table(genomes: Sequence[Genome]) -> dict[str, dict[str, Any]]:
    """JSON records by key, of the genomes and of all that they need."""
    table: dict[str, dict[str, Any]] = {}
    left = list(genomes)
    while left:
        genome = left.pop()
        if genome.key not in table:
            table[genome.key] = genome.record()
            left.extend(genome.parents)
    return dict(sorted(table.items()))


def from_table(table: Mapping[str, Mapping[str, Any]]) -> dict[str, Genome]:
    """The inverse of `to_table`.

    Raises:
        ValueError: a record that is missing, or does not have the content its key says.
    """
    made: dict[str, Genome] = {}
    left = list(table)
    while left:
        key = left.pop()
        if key in made:
            continue
        if key not in table:
            raise ValueError(f"genome {key}: expected its record in the table, got none")
        record = dict(table[key])
        missing = [s for s, _ in record["terms"] if isinstance(s, str) and s not in made]
        if missing:
            left += [key, *missing]
            continue
        terms = tuple((made[s] if isinstance(s, str) else s, w) for s, w in record.pop("terms"))
        noises = tuple(Noise(**noise) for noise in record.pop("noises"))
        made[key] = Genome(terms, noises, **record)
        if made[key].key != key:
            raise ValueError(f"genome {key}: expected content with this key, got {made[key].key}")
    return made


def _ordered(terms: Mapping[Source, float]) -> tuple[tuple[Source, float], ...]:
    return tuple(sorted(terms.items(), key=lambda term: str(source_key(term[0])).rjust(32)))
