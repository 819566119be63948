"""Initialisation, crossover, mutation, succession: recipes in, recipes out.

child     x = rule(f_i / (f_i + f_j) x_i, f_j / (f_i + f_j) x_j)
mutant    x' = x + m e,  m ~ Bernoulli(gene rate), e ~ N(0, sigma^2) per element
move      v <- (r0 phi0 v + r1 phi1 (p - x) + r2 phi2 (g - x) - r3 phi3 (w - x)) / C
          x <- x + lambda v,  C = sum_i r_i phi_i
p, g, w: the individual's best place, the best and the worst place of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from gemma_ext.papers.genome.config import Search
from gemma_ext.papers.genome.draws import draws, seed_of
from gemma_ext.papers.genome.population import Individual, chances, drawn, released_chances
from gemma_ext.papers.genome.recipe import Genome, Noise, applied, expert, mix, with_noise


def initial(search: Search, experts: int) -> list[Individual]:
    """N merges of random pairs of experts, or the experts themselves.

    All unordered pairs, shuffled, the first N of them (again from the start beyond); weights are
    uniform and normalised. One expert has no pair and stands alone.
    """
    if search.start == "experts" or experts == 1:
        return [Individual(i, expert(i), "expert", (i,), 0) for i in range(experts)]
    pairs = list(combinations(range(experts), 2))
    order = draws(search.seed, "pairs").permutation(len(pairs))
    made = []
    for i in range(search.size):
        a, b = pairs[order[i % len(pairs)]]
        u = draws(search.seed, "pair", i).random(2)
        share = u[0] / (u[0] + u[1]) if u.sum() > 0 else 0.5
        genome = crossed(search, search.combine_method, expert(a), expert(b), share, ("pair", i))
        made.append(Individual(i, genome, "pair", (a, b), 0))
    return made


def crossover(
    search: Search, population: Sequence[Individual], generation: int, first_id: int
) -> list[Individual]:
    """Children of floor(|P| / 2) trials, each of which happens with `cross_rate`."""
    weights = roulette(search)([one.fitness for one in population])
    chosen_by = weights if search.parents == "roulette" else [1.0] * len(population)
    children: list[Individual] = []
    for trial in range(len(population) // 2):
        random = draws(search.seed, generation, "crossover", trial)
        if random.random() >= search.cross_rate:
            continue
        i, j = drawn(chosen_by, 2, random)
        total = weights[i] + weights[j]
        share = float(weights[i] / total) if total > 0.0 else 0.5
        a, b = population[i], population[j]
        place = (generation, "child", trial)
        genome = crossed(search, search.cross_method, a.genome, b.genome, share, place)
        serial = first_id + len(children)
        children.append(Individual(serial, genome, "crossover", (a.id, b.id), generation))
    return children


def crossed(
    search: Search, rule: str, a: Genome, b: Genome, share: float, place: tuple[int | str, ...]
) -> Genome:
    """`rule` over two genomes with weights `share`, 1 - `share`; one that meets itself stays."""
    if a == b:
        return a
    parts = [(a, share), (b, 1.0 - share)]
    if rule == "linear":
        return mix(parts, search.longest)
    return applied(
        rule,
        parts,
        density=search.density,
        rescale="no_rescale" not in search.defects,
        seed=seed_of(search.seed, *place),
    )


def mutation(
    search: Search, population: Sequence[Individual], generation: int, first_id: int
) -> list[Individual]:
    """A mutant of each individual, with `individual_mutation_rate`; nobody is altered.

    With a gene rate or sigma of 0 mutants are clones.
    """
    mutants: list[Individual] = []
    for one in population:
        if (
            draws(search.seed, generation, "mutate", one.id).random()
            < search.individual_mutation_rate
        ):
            seed = seed_of(search.seed, generation, "noise", one.id)
            noise = Noise(seed, search.gene_mutation_rate, search.sigma)
            genome = with_noise(one.genome, noise, search.longest)
            serial = first_id + len(mutants)
            mutants.append(Individual(serial, genome, "mutation", (one.id,), generation))
    return mutants


def succession(
    search: Search,
    population: Sequence[Individual],
    generation: int,
    step: float,
    best: Genome,
    worst: Genome,
) -> tuple[list[Individual], float]:
    """Everybody moved, and the lambda of the next generation.

    A first velocity points to a random other individual.
    """
    moved: list[Individual] = []
    here = [one.genome for one in population]
    for at, one in enumerate(population):
        velocity = one.velocity
        if velocity is None:
            others = [genome for other, genome in enumerate(here) if other != at] or [one.genome]
            other = draws(search.seed, generation, "velocity", one.id).integers(len(others))
            velocity = mix([(others[other], 1.0), (one.genome, -1.0)])
        own = one.genome if "best_is_alias" in search.defects else (one.best or one.genome)
        once = "draw_once" in search.defects
        place = ("r",) if once else (generation, "r", one.id)
        r = draws(search.seed, *place).random(4)
        pulls = [ri * phi for ri, phi in zip(r.tolist(), search.phi, strict=True)]
        genome, velocity = stepped(
            one.genome, velocity, own, best, worst, pulls, step, search.longest
        )
        moved.append(replace(one, genome=genome, velocity=velocity))
        if "decay_per_individual" in search.defects:
            step *= search.step_decay
    if "decay_per_individual" not in search.defects:
        step *= search.step_decay
    return moved, step


def stepped(
    x: Genome,
    v: Genome,
    own: Genome,
    best: Genome,
    worst: Genome,
    pulls: Sequence[float],
    step: float,
    longest: int | None = None,
) -> tuple[Genome, Genome]:
    """(x, v) after one move: `pulls` are r_i phi_i, `step` is lambda; no pull, no move."""
    total = sum(pulls)
    if total == 0.0:
        return x, v
    c0, c1, c2, c3 = (pull / total for pull in pulls)
    centre = c1 + c2 - c3
    pulled = [(v, c0), (own, c1), (best, c2), (worst, -c3)]
    velocity = mix([*pulled, (x, -centre)], longest)
    # not x + step v: where all of the pull is to one place and lambda is 1, x vanishes exactly
    position = mix([(x, 1.0 - step * centre), *((g, step * c) for g, c in pulled)], longest)
    return position, velocity


def roulette(search: Search):
    """Fitness to weights of a roulette."""
    return released_chances if "roulette_by_total" in search.defects else chances
