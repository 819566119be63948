"""Selection, crossover, mutation and succession against their formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from genome_toy import toy_pool
from scipy import stats

from gemma_ext.ops.souping import Move, swarm_
from gemma_ext.papers.genome import operators
from gemma_ext.papers.genome.config import COMPAT, DEFECTS, PRESETS, Search, search_from
from gemma_ext.papers.genome.draws import draws, seed_of
from gemma_ext.papers.genome.materialise import Materialiser
from gemma_ext.papers.genome.population import (
    Individual,
    better,
    chances,
    drawn,
    individual_from,
    ranked,
    released_chances,
    select,
)
from gemma_ext.papers.genome.recipe import Noise, applied, expert, mix, with_noise

NAN, INF = math.nan, math.inf
GENOME = frozenset(DEFECTS)


def people(fitness):
    return [
        Individual(10 + i, expert(i), "expert", (i,), 0, f, best=expert(i), best_fitness=f)
        for i, f in enumerate(fitness)
    ]


def test_draws_depend_on_their_place_alone():
    first = draws(1, 2, "r", 3).random(4)
    draws(1, 2, "r", 4).random(100)
    assert np.array_equal(first, draws(1, 2, "r", 3).random(4))
    places = [(1, 2, "r", 3), (1, 2, "r", 4), (1, 3, "r", 3), (2, 2, "r", 3), (1, 2, "s", 3)]
    assert len({draws(*place).random() for place in places}) == 5
    assert len({seed_of(*place) for place in places}) == 5
    assert all(0 <= seed_of(0, i) < 2**63 for i in range(100))


def test_the_stream_of_a_decision_is_this_one():
    """Lineages are reproducible over releases of numpy too."""
    assert draws(42, "pairs").random(2).tolist() == [0.9108164749954278, 0.28461541843755733]


# Fitness to weights.


@pytest.mark.parametrize(
    ("fitness", "want"),
    [
        ([1, 3], [0.25, 0.75]),
        ([0, 0, 0], [1 / 3, 1 / 3, 1 / 3]),
        ([NAN, 1, 1], [0, 0.5, 0.5]),
        ([NAN, NAN], [0.5, 0.5]),
        ([-1, 0, 1], [0, 1 / 3, 2 / 3]),
        ([-2, -2], [0.5, 0.5]),
        ([INF, 1, -INF], [0, 1, 0]),
        ([0, NAN, 0], [0.5, 0, 0.5]),
        ([5], [1]),
        ([], []),
    ],
)
def test_chances(fitness, want):
    assert chances(fitness).tolist() == pytest.approx(want)


def test_the_released_roulette_is_the_same_where_it_works():
    assert np.array_equal(released_chances([1, 3, 4]), chances([1, 3, 4]))
    for fitness in ([0, 0], [1, -0.5], [1, NAN]):
        with pytest.raises(ValueError, match="roulette_by_total"):
            released_chances(fitness)


def test_roulette_frequencies():
    weights, trials = [1.0, 2.0, 0.0, 5.0], 4000
    counts = np.zeros(4)
    for trial in range(trials):
        (first,) = drawn(weights, 1, draws(0, trial))
        counts[first] += 1
    assert counts[2] == 0
    expected = np.delete(np.array(weights), 2) / 8 * trials
    assert stats.chisquare(np.delete(counts, 2), expected).pvalue > 1e-4


def test_pairs_are_drawn_without_replacement():
    """P(i then j) = p_i p_j / (1 - p_i)."""
    weights, trials = np.array([0.5, 0.3, 0.2]), 6000
    counts = np.zeros((3, 3))
    for trial in range(trials):
        counts[tuple(drawn(weights, 2, draws(1, trial)))] += 1
    expected = np.outer(weights, weights) / (1 - weights)[:, None]
    off = ~np.eye(3, dtype=bool)
    assert counts[~off].sum() == 0
    assert stats.chisquare(counts[off], expected[off] * trials).pvalue > 1e-4


def test_those_without_weight_come_last():
    for trial in range(20):
        order = drawn([0.0, 1.0, 0.0, 2.0], 9, draws(trial))
        assert sorted(order) == [0, 1, 2, 3]
        assert sorted(order[:2]) == [1, 3]


def test_ranks_put_nan_last_and_the_first_of_equals_first():
    assert ranked([1, NAN, 3, 3, -INF, NAN]) == [2, 3, 0, 4, 1, 5]
    assert better(-INF, NAN)
    assert not better(NAN, -INF)
    assert not better(NAN, NAN)
    assert not better(1.0, 1.0)


@pytest.mark.parametrize("kind", ["elite", "tournament", "roulette", "rank", "random"])
@pytest.mark.parametrize("fitness", [[3, 1, 2, 5, 4, 0], [0] * 6, [NAN, -1, 2, NAN, INF, -INF]])
def test_selections_take_whole_numbers_without_replacement(kind, fitness):
    for count in (0, 1, 4, 6, 9):
        chosen = select(kind, fitness, count, draws(0, count))
        assert len(chosen) == min(count, 6)
        assert len(set(chosen)) == len(chosen)
        assert chosen == select(kind, fitness, count, draws(0, count))


def test_a_tournament_of_everybody_is_the_best():
    assert select("tournament", [1, 5, 3], 3, draws(0)) == [1, 2, 0]
    assert select("tournament", [NAN, 5], 2, draws(0)) == [1, 0]


def test_tournaments_of_three_have_their_frequencies():
    """The fittest of 5 wins the first round if it is among 3 drawn of 5: 3 / 5; the next 3 / 10."""
    counts = np.zeros(5)
    for trial in range(3000):
        counts[select("tournament", [5, 4, 3, 2, 1], 1, draws(trial))[0]] += 1
    assert counts[3:].sum() == 0
    assert stats.chisquare(counts[:3], np.array([0.6, 0.3, 0.1]) * 3000).pvalue > 1e-4


def test_an_unknown_selection_is_named():
    with pytest.raises(ValueError, match=r"selection: expected tournament.*got 'lottery'"):
        select("lottery", [1.0], 1, draws(0))


# Initialisation.


def test_pairs_come_once_each_before_any_comes_again():
    search = Search(size=20)
    population = operators.initial(search, 4)
    pairs = [one.parents for one in population]
    assert sorted(pairs[:6]) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert pairs[6:12] == pairs[:6]
    for one in population:
        assert sum(w for _, w in one.genome.terms) == pytest.approx(1, abs=1e-12)
        assert [source for source, _ in one.genome.terms] == list(one.parents)
    assert len({one.genome for one in population}) == 20
    assert [one.id for one in population] == list(range(20))


def test_experts_may_start_as_they_are():
    population = operators.initial(Search(start="experts", size=3), 5)
    assert [one.genome for one in population] == [expert(i) for i in range(5)]
    assert [one.genome for one in operators.initial(Search(), 1)] == [expert(0)]


def test_another_seed_is_another_start():
    a, b = (operators.initial(Search(seed=s), 5) for s in (0, 1))
    assert [one.genome for one in a] != [one.genome for one in b]


# Crossover.


def test_weights_of_a_crossover_are_fitness_shares():
    search = Search(cross_rate=1.0)
    (child,) = operators.crossover(search, people([3.0, 1.0]), 1, 100)
    assert child.genome == mix([(expert(0), 0.75), (expert(1), 0.25)])
    assert sorted(child.parents) == [10, 11]
    assert (child.id, child.made, child.born) == (100, "crossover", 1)
    assert math.isnan(child.fitness)  # never inherited


@pytest.mark.parametrize("rule", ["linear", "ties", "dare_linear", "random", "product"])
def test_a_parent_that_meets_itself_stays(rule):
    search = Search(cross_rate=1.0, cross_method=rule)
    twins = [replace(one, genome=expert(2)) for one in people([1.0, 2.0])]
    (child,) = operators.crossover(search, twins, 1, 5)
    assert child.genome == expert(2)


def test_crossover_happens_at_its_rate():
    population = people([1.0] * 40)
    counts = [
        len(operators.crossover(Search(cross_rate=0.3), population, g, 0)) for g in range(200)
    ]
    assert max(counts) <= 20
    mean, sigma = 200 * 20 * 0.3, (200 * 20 * 0.3 * 0.7) ** 0.5
    assert abs(sum(counts) - mean) < 4 * sigma
    assert operators.crossover(Search(cross_rate=0.0), population, 1, 0) == []
    assert operators.crossover(Search(cross_rate=1.0), people([1.0]), 1, 0) == []


def test_crossover_survives_any_fitness():
    for fitness in ([0.0, 0.0], [NAN, NAN], [-1.0, -3.0], [NAN, 2.0], [-INF, INF]):
        (child,) = operators.crossover(Search(cross_rate=1.0), people(fitness), 1, 0)
        weights = [w for _, w in child.genome.terms]
        assert sum(weights) == pytest.approx(1.0)
        assert all(0 <= w <= 1 for w in weights)
    search = Search(cross_rate=1.0, defects=frozenset({"roulette_by_total"}))
    with pytest.raises(ValueError, match="roulette_by_total"):
        operators.crossover(search, people([0.0, 0.0]), 1, 0)


def test_parents_may_be_chosen_blindly():
    search = Search(cross_rate=1.0, parents="random")
    seen = set()
    for g in range(50):
        (child,) = operators.crossover(search, people([1.0, 0.0, 0.0]), g, 0)
        seen.add(tuple(sorted(child.parents)))
    assert seen == {(10, 11), (10, 12), (11, 12)}


def test_other_rules_take_their_options_from_the_search():
    search = Search(cross_rate=1.0, cross_method="dare_ties", density=0.3)
    (child,) = operators.crossover(search, people([1.0, 1.0]), 4, 0)
    genome = child.genome
    assert (genome.rule, genome.density, genome.rescale) == ("dare_ties", 0.3, True)
    (other,) = operators.crossover(search, people([1.0, 1.0]), 5, 0)
    assert other.genome.seed != genome.seed
    released = replace(search, defects=GENOME)
    (child,) = operators.crossover(released, people([1.0, 1.0]), 4, 0)
    assert child.genome == replace(genome, rescale=False)


# Mutation.


def test_mutation_alters_nobody_and_keeps_its_rate():
    population = people([1.0] * 50)
    search = Search(individual_mutation_rate=0.3, gene_mutation_rate=0.1, sigma=0.5)
    count = 0
    for g in range(100):
        mutants = operators.mutation(search, population, g, 500)
        assert [one.id for one in mutants] == list(range(500, 500 + len(mutants)))
        count += len(mutants)
        for one in mutants:
            (noise,) = one.genome.noises
            assert (noise.rate, noise.sigma) == (0.1, 0.5)
    assert population == people([1.0] * 50)
    assert abs(count - 1500) < 4 * (5000 * 0.3 * 0.7) ** 0.5
    assert operators.mutation(replace(search, individual_mutation_rate=0.0), population, 1, 0) == []


def test_mutants_of_a_zero_rate_are_clones():
    for still in ({"gene_mutation_rate": 0.0}, {"sigma": 0.0}):
        search = Search(individual_mutation_rate=1.0, **still)
        mutants = operators.mutation(search, people([1.0, 2.0]), 1, 0)
        assert [one.genome for one in mutants] == [expert(0), expert(1)]


def test_a_mutant_changes_its_share_of_weights_by_its_sigma():
    rate, sigma, n = 0.1, 0.05, 200 * 200
    pool = toy_pool()
    pool.experts = [{"x": torch.zeros(200, 200)}]
    pool.shapes = {"x": torch.Size((200, 200))}
    pool.__dict__.pop("units", None)
    x = Materialiser(pool).tensors(with_noise(expert(0), Noise(11, rate, sigma)))["x"].double()
    changed = x[x != 0]
    assert abs(len(changed) / n - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
    assert abs(float(changed.square().mean()) / sigma**2 - 1) < 4 * (2 / len(changed)) ** 0.5
    assert abs(float(changed.mean())) < 4 * sigma / len(changed) ** 0.5


# Succession.


def velocity_and_places():
    x, v = expert(0), mix([(expert(1), 0.5), (expert(2), -0.5)])
    return x, v, expert(2), expert(3), expert(4)


def test_all_pull_to_the_best_lands_on_it():
    x, v, own, best, worst = velocity_and_places()
    place, velocity = operators.stepped(x, v, own, best, worst, [0, 0, 1, 0], 1.0)
    assert place == best
    assert velocity == mix([(best, 1.0), (x, -1.0)])


def test_inertia_alone_keeps_the_velocity():
    x, v, own, best, worst = velocity_and_places()
    place, velocity = operators.stepped(x, v, own, best, worst, [0.4, 0, 0, 0], 0.5)
    assert velocity == v
    assert place == mix([(x, 1.0), (v, 0.5)])


def test_no_pull_is_no_move():
    x, v, *rest = velocity_and_places()
    assert operators.stepped(x, v, *rest, [0, 0, 0, 0], 1.0) == (x, v)


def test_a_move_is_the_formula_and_the_kernel():
    pool = toy_pool()
    writer = Materialiser(pool)
    x, v, own, best, worst = (
        with_noise(genome, Noise(i, 0.5, 0.1)) for i, genome in enumerate(velocity_and_places())
    )
    pulls, step = [0.11, 0.07, 0.19, 0.03], 0.37
    place, velocity = operators.stepped(x, v, own, best, worst, pulls, step)
    tensors = [writer.tensors(genome)["x"] for genome in (x, v, own, best, worst)]
    tx, tv, tp, tg, tw = (t.double() for t in tensors)
    c = [pull / sum(pulls) for pull in pulls]
    want_v = c[0] * tv + c[1] * (tp - tx) + c[2] * (tg - tx) - c[3] * (tw - tx)
    got = [writer.tensors(genome)["x"].double() for genome in (place, velocity)]
    torch.testing.assert_close(got[1], want_v, rtol=0, atol=2e-6)
    torch.testing.assert_close(got[0], tx + step * want_v, rtol=0, atol=2e-6)
    move = Move(*tensors, name="x")
    swarm_([move], c, step)
    torch.testing.assert_close(move.x.double(), got[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(move.v.double(), got[1], rtol=0, atol=2e-6)


def moved(search, population, generation=1, step=0.5):
    best, worst = expert(3), expert(4)
    return operators.succession(search, population, generation, step, best, worst)


def test_everybody_draws_anew_and_lambda_decays_once():
    search = PRESETS["genome+"]
    population = people([1.0, 2.0, 3.0])
    after, step = moved(search, population)
    assert step == 0.5 * 0.95
    assert [one.id for one in after] == [10, 11, 12]
    for one in population:
        r = draws(search.seed, 1, "r", one.id).random(4).tolist()
        pulls = [a * b for a, b in zip(r, search.phi, strict=True)]
        others = [other.genome for other in population if other is not one]
        firsts = [
            operators.stepped(
                one.genome,
                mix([(other, 1.0), (one.genome, -1.0)]),
                one.best,
                expert(3),
                expert(4),
                pulls,
                0.5,
            )[0]
            for other in others
        ]
        assert next(x for x in after if x.id == one.id).genome in firsts
    again, _ = moved(search, after, generation=2, step=step)
    assert again[0].velocity != after[0].velocity


def test_an_individual_far_from_its_best_is_pulled_there():
    """The alias of the release has no such pull; everything else of it is tested below."""
    search = replace(
        PRESETS["genome+"], inertia=0.0, cognitive=1.0, social=0.0, repel=0.0, defects=frozenset()
    )
    (one,) = people([1.0])
    lost = replace(one, genome=expert(1), best=expert(2))
    (home,), _ = moved(search, [lost], step=1.0)
    assert home.genome == expert(2)
    (stuck,), _ = moved(replace(search, defects=frozenset({"best_is_alias"})), [lost], step=1.0)
    assert stuck.genome == expert(1)


def test_compat_reproduces_the_released_moves():
    """x_i <- x_i + lambda 0.95^i v_i, one r for the run, p = x, on fixed numbers in float64."""
    search = replace(PRESETS["genome+"], defects=COMPAT["genome"])
    population = [
        replace(one, velocity=mix([(expert((i + 1) % 3), 1.0), (one.genome, -1.0)]))
        for i, one in enumerate(people([1.0, 2.0, 3.0]))
    ]
    pool = toy_pool()
    x = [pool.experts[i]["x"].double() for i in range(5)]
    r = draws(search.seed, "r").random(4)
    pulls = r * np.array(search.phi)
    step = 0.5
    places, velocities = list(x[:3]), [x[(i + 1) % 3] - x[i] for i in range(3)]
    now, strength = population, step
    for generation in (1, 2):
        now, strength = moved(search, now, generation, strength)
        for i in range(3):
            terms = (
                pulls[0] * velocities[i]
                + pulls[1] * (places[i] - places[i])
                + pulls[2] * (x[3] - places[i])
                - pulls[3] * (x[4] - places[i])
            )
            velocities[i] = terms / pulls.sum()
            places[i] = places[i] + step * velocities[i]
            step *= 0.95
    assert strength == pytest.approx(step, rel=1e-15)
    writer = Materialiser(pool)
    for one, want in zip(now, places, strict=True):
        # one ulp of float32 at the size of the sums
        torch.testing.assert_close(
            writer.tensors(one.genome)["x"].double(), want, rtol=0, atol=2.0**-22
        )


def test_individuals_go_to_json_and_back():
    one = replace(people([0.1])[0], velocity=applied("ties", [(expert(0), 1.0)]))
    genomes = {g.key: g for g in one.genomes()}
    assert individual_from(one.record(), genomes) == one


# Parameters.


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"method": "darwin"}, "preset: expected one of genome"),
        ({"preset": "genome", "method": "darwin"}, "method: expected one of genome, genome"),
        ({"cross_method": "svd"}, "cross_method: expected one of linear"),
        ({"cross_rate": 1.5}, r"cross_rate: expected a number in \[0, 1\], got 1.5"),
        ({"size": 0}, "size: expected at least 1, got 0"),
        ({"longest": 1}, "longest: expected at least 2, got 1"),
        ({"compat": "released"}, "compat: expected one of fixed, genome, got 'released'"),
        ({"defects": ["sleeps"]}, "defects: expected one of stale_fitness"),
        ({"populations": 3}, "search: expected keys of .*got 'populations'"),
    ],
)
def test_parameters_that_do_not_fit_are_named(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        search_from(values)


def test_presets_are_the_released_defaults():
    genome, plus = search_from({}), search_from({"method": "genome+"})
    assert (genome.size, genome.generations, genome.cross_rate) == (10, 50, 0.8)
    assert (genome.individual_mutation_rate, genome.gene_mutation_rate) == (0.15, 0.01)
    assert (genome.sigma, genome.elite_percent, genome.patience) == (0.01, 0.02, 5)
    assert (plus.size, plus.capacity, plus.generations) == (10, 20, 20)
    assert (plus.individual_mutation_rate, plus.gene_mutation_rate, plus.sigma) == (0.3, 0.1, 0.05)
    assert (plus.step, plus.step_decay, plus.phi) == (0.5, 0.95, (0.2, 0.2, 0.2, 0.1))
    script = search_from({"preset": "genome-script", "seed": 3})
    assert (script.cross_rate, script.generations, script.seed) == (0.0, 10, 3)
    assert search_from({"preset": "genome+-script"}).individual_mutation_rate == 0.0
    assert search_from({}).defects == frozenset()
    assert search_from({"compat": "genome"}).defects == GENOME
    assert search_from({"defects": ["draw_once"]}).defects == {"draw_once"}
