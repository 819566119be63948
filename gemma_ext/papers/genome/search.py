"""The loop: move, cross, mutate, evaluate, select; a pure function of seed and fitness.

GENOME     cross -> mutate -> evaluate -> select
GENOME+    move -> evaluate -> cross -> mutate -> evaluate -> select
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gemma_ext.papers.genome import operators
from gemma_ext.papers.genome.config import Search
from gemma_ext.papers.genome.draws import draws
from gemma_ext.papers.genome.evaluation import Account
from gemma_ext.papers.genome.lineage import State, Workspace, event
from gemma_ext.papers.genome.population import Individual, better, ranked, select
from gemma_ext.papers.genome.recipe import Genome

Progress = Callable[[State, Account], None]


@dataclass(frozen=True)
class Evolved:
    """What a search found.

    Attributes:
        best: the genome with the highest validation fitness of all evaluated, and that fitness.
        fitness: of `best`.
        population: the last one, fittest first.
        generations: done.
        history: (evaluations, best fitness so far) after each evaluation.
    """

    best: Genome
    fitness: float
    population: tuple[Individual, ...]
    generations: int
    history: tuple[tuple[int, float], ...]


def evolve(
    search: Search,
    account: Account,
    experts: int,
    *,
    workspace: Workspace | None = None,
    progress: Progress | None = None,
) -> Evolved:
    """Runs GENOME or GENOME+ to its end, from where `workspace` left it.

    Args:
        search: parameters; `search.budget` bounds the evaluations beside `account.budget`.
        account: gives the fitness of genomes.
        experts: M of the pool.
        workspace: keeps the state after each generation.
        progress: called after each generation.

    Raises:
        ValueError: no expert; with "roulette_by_total", a fitness that the release cannot take.
    """
    if experts < 1:
        raise ValueError(f"experts: expected at least 1, got {experts}")
    if search.budget is not None:
        account.budget = min(search.budget, account.budget or search.budget)
    state = workspace.load(account) if workspace else None
    if state is None:
        state = _start(search, account, experts)
        _keep(workspace, state, account)
    while not _ended(search, account, state):
        state = generation(search, account, state)
        _keep(workspace, state, account)
        if progress is not None:
            progress(state, account)
    genome, fitness = state.best
    population = [state.population[i] for i in ranked([x.fitness for x in state.population])]
    return Evolved(genome, fitness, tuple(population), state.generation, tuple(account.history))


def generation(search: Search, account: Account, state: State) -> State:
    """One generation on."""
    now = state.generation + 1
    before = state.best[1]
    state, population = replace(state, generation=now), list(state.population)
    if search.moves:
        population, step = operators.succession(
            search, population, now, state.step, state.best[0], state.worst[0]
        )
        if "stale_fitness" not in search.defects:
            population = _evaluated(account, population)
        state, population = _seen(replace(state, step=step), population, "move")
    children = operators.crossover(search, population, now, state.next_id)
    first = state.next_id + len(children)
    mutants = operators.mutation(search, [*population, *children], now, first)
    state, born = _seen(state, _evaluated(account, [*children, *mutants]))
    return replace(
        state,
        population=tuple(_selected(search, population + born, now)),
        next_id=first + len(mutants),
        stale=0 if better(state.best[1], before) else state.stale + 1,
    )


def _start(search: Search, account: Account, experts: int) -> State:
    population = _evaluated(account, operators.initial(search, experts))
    state = State(next_id=len(population), step=search.step)
    state, population = _seen(state, population)
    return replace(state, population=tuple(population))


def _evaluated(account: Account, population: Sequence[Individual]) -> list[Individual]:
    fitness = account.fitness([one.genome for one in population])
    return [replace(one, fitness=f) for one, f in zip(population, fitness, strict=True)]


def _seen(
    state: State, population: Sequence[Individual], made: str | None = None
) -> tuple[State, list[Individual]]:
    """Best, worst and lineage with these individuals, and they with their own best places."""
    best, worst, members = state.best, state.worst, []
    for one in population:
        if one.best is None or better(one.fitness, one.best_fitness):
            one = replace(one, best=one.genome, best_fitness=one.fitness)
        if best[0] is None or better(one.fitness, best[1]):
            best = (one.genome, one.fitness)
        if worst[0] is None or one.fitness < worst[1] or math.isnan(worst[1]):
            worst = (one.genome, one.fitness)
        members.append(one)
    events = [event(state.generation, made or one.made, one) for one in members]
    return replace(state, best=best, worst=worst, events=(*state.events, *events)), members


def _selected(search: Search, population: list[Individual], now: int) -> list[Individual]:
    """At most `capacity`: elites first, the rest by `search.selection` from the others."""
    if len(population) <= search.capacity:
        return population
    share = search.elite_percent
    if search.moves:
        elites = round(len(population) * share)
    else:
        elites = int(share * search.capacity)
    elites = min(elites, search.capacity)
    order = ranked([one.fitness for one in population])
    kept, others = [population[i] for i in order[:elites]], [population[i] for i in order[elites:]]
    chosen = select(
        search.selection,
        [one.fitness for one in others],
        search.capacity - elites,
        draws(search.seed, now, "select"),
        roulette=operators.roulette(search),
    )
    return kept + [others[i] for i in chosen]


def _ended(search: Search, account: Account, state: State) -> bool:
    tired = search.patience is not None and state.stale >= search.patience
    return state.generation >= search.generations or tired or account.left <= 0


def _keep(workspace: Workspace | None, state: State, account: Account) -> None:
    if workspace is not None:
        workspace.save(state, account)
