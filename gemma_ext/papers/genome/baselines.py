"""What else could be done with the same pool and the same number of evaluations.

Each takes an account with a budget and leaves its choice, made on the validation split, as
`account.best`. Static merges spend the budget on drawn options, the published default first.

| name | what it tries |
|---|---|
| best parent | every expert |
| uniform soup | the mean of all experts |
| scaled soup | its multiples (task arithmetic where there is a base) |
| ties, dare | density and scale, over all experts |
| random search | weights uniform on the simplex |
| lorahub | weights in [-1.5, 1.5] without gradients, arXiv 2307.13269 |
| model swarms | moves of the experts, arXiv 2410.11163 |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_ext.extras import require
from gemma_ext.papers.genome.draws import draws
from gemma_ext.papers.genome.evaluation import Account
from gemma_ext.papers.genome.operators import stepped
from gemma_ext.papers.genome.population import better
from gemma_ext.papers.genome.recipe import Genome, applied, expert, mix

LORAHUB_BOUND = 1.5
LORAHUB_PENALTY = 0.05
_AT_A_TIME = 8  # drawn genomes given to the workers together
_DENSITY, _SCALE = (0.1, 1.0), (0.2, 2.0)


@dataclass(frozen=True)
class Swarm:
    """Parameters of Model Swarms; the defaults are its script's.

    Attributes:
        step, step_decay, step_floor: lambda, its factor per iteration, and where it ends.
        patience: iterations without a new best of all until the search ends.
        restart: share of `patience` after which a particle without a new best of its own goes back
            to that best, at rest.
    """

    iterations: int = 200
    inertia: float = 0.4
    cognitive: float = 0.3
    social: float = 0.3
    repel: float = 0.3
    step: float = 1.0
    step_decay: float = 0.95
    step_floor: float = 0.1
    patience: int = 10
    restart: float = 0.5


def best_parent(account: Account, experts: int, seed: int = 0) -> None:
    account.fitness([expert(i) for i in range(experts)])


def uniform_soup(account: Account, experts: int, seed: int = 0) -> None:
    account.fitness([weighted([1.0 / experts] * experts)])


def scaled_soup(account: Account, experts: int, seed: int = 0) -> None:
    """scale / M sum_i s_i, scale in [0.2, 2]."""

    def candidate(at: int) -> Genome:
        scale = draws(seed, "scaled soup", at).uniform(*_SCALE) if at else 1.0
        return weighted([scale / experts] * experts)

    _spend(account, candidate)


def ties(account: Account, experts: int, seed: int = 0) -> None:
    """TIES with density in [0.1, 1] and scale in [0.2, 2]; 0.2 and 1 first."""

    def candidate(at: int) -> Genome:
        density, scale = _drawn(seed, "ties", at, (0.2, 1.0))
        return applied("ties", [(expert(i), scale) for i in range(experts)], density=density)

    _spend(account, candidate)


def dare(account: Account, experts: int, seed: int = 0) -> None:
    """DARE (linear, rescaled) in the same ranges, with a mask of its own each time."""

    def candidate(at: int) -> Genome:
        density, scale = _drawn(seed, "dare", at, (0.2, 1.0))
        parts = [(expert(i), scale / experts) for i in range(experts)]
        return applied("dare_linear", parts, density=density, seed=at)

    _spend(account, candidate)


def random_search(account: Account, experts: int, seed: int = 0) -> None:
    def candidate(at: int) -> Genome:
        return weighted(draws(seed, "random", at).dirichlet(np.ones(experts)).tolist())

    _spend(account, candidate)


def lorahub(account: Account, experts: int, seed: int = 0, *, sign: float = -1.0) -> None:
    """Weights w in [-1.5, 1.5]^M from 0 that minimise loss + 0.05 mean |w|.

    The loss is -log fitness where the fitness of w = 0 is above 0: of a likelihood that is the
    paper's loss, in nats. Else it is -fitness. The release's sign, +1, maximises
    fitness + 0.05 mean |w|.

    The search is COBYLA of scipy (the paper's is nevergrad's NGOpt, which chooses such methods for
    few evaluations); further starts are drawn until the budget is spent.

    Raises:
        ImportError: scipy is missing.
    """
    require("lorahub", "genome", "scipy")
    from scipy.optimize import minimize

    def loss(w: np.ndarray) -> float:
        w = np.clip(w, -LORAHUB_BOUND, LORAHUB_BOUND)  # COBYLA steps over its bounds
        fitness = account.fitness([weighted(w.tolist())])[0]
        if positive:
            fitness = math.log(fitness) if fitness > 0.0 else math.nan
        value = fitness + sign * LORAHUB_PENALTY * float(np.abs(w).mean())
        if better(value, found[1]):
            found[:] = [w.tolist(), value]
        return -value if np.isfinite(value) else 1e9

    found: list = [None, math.nan]
    positive = sign < 0.0 and account.fitness([weighted([0.0] * experts)])[0] > 0.0
    bounds = [(-LORAHUB_BOUND, LORAHUB_BOUND)] * experts
    start = 0
    while account.left > 0:
        before = account.used
        first = np.zeros(experts)
        if start:
            first = draws(seed, "lorahub", start).uniform(-LORAHUB_BOUND, LORAHUB_BOUND, experts)
        options = {
            "maxiter": max(int(min(account.left, 1000)), experts + 2),
            "rhobeg": LORAHUB_BOUND / 3,
        }
        minimize(loss, first, method="COBYLA", bounds=bounds, options=options)
        start += 1
        if account.budget is None or account.used == before:
            break
    if found[0] is not None:  # the best by the regularised value
        chosen = weighted(found[0])
        account.best = (chosen, account.fitness([chosen])[0])


def model_swarms(
    account: Account, experts: int, seed: int = 0, swarm: Swarm = Swarm(), longest: int = 16
) -> None:
    """The experts as particles; every r is drawn per particle and step."""
    places = [expert(i) for i in range(experts)]
    fitness = account.fitness(places)
    own = list(zip(places, fitness, strict=True))
    own_stale, stale = [0] * experts, 0
    velocities = []
    for i in range(experts):
        other = int(draws(seed, "swarm", "velocity", i).integers(max(experts - 1, 1)))
        others = [g for j, g in enumerate(places) if j != i] or [places[i]]
        velocities.append(mix([(others[other], 1.0), (places[i], -1.0)]))
    best, worst = _extreme(own, better), _extreme(own, lambda a, b: better(b, a))
    phi = (swarm.inertia, swarm.cognitive, swarm.social, swarm.repel)
    step = swarm.step
    for iteration in range(swarm.iterations):
        if account.left <= 0 or stale >= swarm.patience:
            return
        for i in range(experts):
            if own_stale[i] >= swarm.restart * swarm.patience:
                places[i], own_stale[i] = own[i][0], 0
                velocities[i] = mix([(places[i], 1.0), (places[i], -1.0)])
            r = draws(seed, "swarm", iteration, i).random(4).tolist()
            pulls = [ri * p for ri, p in zip(r, phi, strict=True)]
            places[i], velocities[i] = stepped(
                places[i], velocities[i], own[i][0], best[0], worst[0], pulls, step, longest
            )
        step = max(step * swarm.step_decay, swarm.step_floor)
        stale += 1
        for i, value in enumerate(account.fitness(places)):
            own_stale[i] += 1
            if better(value, own[i][1]):
                own[i], own_stale[i] = (places[i], value), 0
            if better(value, best[1]):
                best, stale = (places[i], value), 0
            if value < worst[1]:
                worst = (places[i], value)


BASELINES: dict[str, Callable[..., None]] = {
    "best parent": best_parent,
    "uniform soup": uniform_soup,
    "scaled soup": scaled_soup,
    "ties": ties,
    "dare": dare,
    "random search": random_search,
    "lorahub": lorahub,
    "model swarms": model_swarms,
}


def weighted(weights: Sequence[float]) -> Genome:
    """sum_i w_i s_i over all experts."""
    return mix([(expert(i), float(w)) for i, w in enumerate(weights)])


def _drawn(seed: int, what: str, at: int, default: tuple[float, float]) -> tuple[float, float]:
    if at == 0:
        return default
    random = draws(seed, what, at)
    return float(random.uniform(*_DENSITY)), float(random.uniform(*_SCALE))


def _spend(account: Account, candidate: Callable[[int], Genome]) -> None:
    """Candidates 0, 1, .. until the budget is used up; 100 without one."""
    most = 100 if account.budget is None else int(account.budget)
    for start in range(0, most, _AT_A_TIME):
        account.fitness([candidate(at) for at in range(start, min(start + _AT_A_TIME, most))])


def _extreme(known: Sequence[tuple[Genome, float]], above: Callable[[float, float], bool]):
    found = known[0]
    for one in known[1:]:
        if above(one[1], found[1]):
            found = one
    return found
