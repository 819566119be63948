"""The loop: what it evaluates, in which order it comes to the same, and how it goes on."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from genome_run import SEARCH, run
from genome_toy import WEIGHTS, Toy, scored

from gemma_ext.distributed.fleet import open_fleet
from gemma_ext.papers.genome import search as loop
from gemma_ext.papers.genome.config import COMPAT, PRESETS, Search
from gemma_ext.papers.genome.evaluation import Account, Job, Ledger, Outcome
from gemma_ext.papers.genome.lineage import FINISHED, State, Workspace
from gemma_ext.papers.genome.recipe import expert, mix
from gemma_ext.papers.genome.search import evolve

STILL = Search(generations=0)


def toy_account(fleet, budget=None, path=None):
    return Account(Ledger(fleet, WEIGHTS, path), budget)


@pytest.fixture
def fleet():
    with open_fleet(Toy()) as fleet:
        yield fleet


def lineage(folder: Path) -> bytes:
    return (folder / "lineage.jsonl").read_bytes()


# What a search does.


@pytest.mark.parametrize("method", ["genome", "genome+"])
def test_it_comes_nearer_than_any_expert(fleet, method):
    experts = max(toy_account(fleet).fitness([expert(i) for i in range(5)]))
    search = replace(PRESETS[method], generations=8, patience=None)
    evolved = evolve(search, toy_account(fleet), 5)
    start = evolve(replace(search, generations=0), toy_account(fleet), 5)
    assert evolved.fitness > max(start.fitness, experts) / 2  # both negative: less than half as far
    assert evolved.generations == 8


def test_with_elites_the_best_survives_and_the_mean_of_an_elite_never_falls(fleet):
    search = replace(PRESETS["genome"], elite_percent=0.1, selection="elite", patience=None)
    account = toy_account(fleet)
    state = loop._start(search, account, 5)
    for _ in range(10):
        before = [one.fitness for one in state.population]
        state = loop.generation(search, account, state)
        after = [one.fitness for one in state.population]
        assert max(after) >= max(before)
        assert sum(after) >= sum(before)
        assert max(after) == state.best[1]


@pytest.mark.parametrize("method", ["genome", "genome+"])
def test_populations_have_their_size_and_no_child_inherits_its_fitness(fleet, method):
    search = replace(PRESETS[method], individual_mutation_rate=0.9, cross_rate=1.0)
    account = toy_account(fleet)
    state = loop._start(search, account, 5)
    for _ in range(4):
        state = loop.generation(search, account, state)
        assert len(state.population) <= search.capacity
        assert len({one.id for one in state.population}) == len(state.population)
        for one in state.population:
            (outcome,) = fleet.map([Job(one.genome)])
            assert one.fitness == outcome.scores["near"]
            assert one.best_fitness >= one.fitness
    assert len(state.population) == search.capacity


def test_stale_fitness_is_a_defect_that_can_be_had(fleet):
    search = replace(
        PRESETS["genome+"],
        cross_rate=0.0,
        individual_mutation_rate=0.0,
        defects=frozenset({"stale_fitness"}),
    )
    account = toy_account(fleet)
    start = loop._start(search, account, 5)
    after = loop.generation(search, account, start)
    assert [one.fitness for one in after.population] == [one.fitness for one in start.population]
    assert [one.genome for one in after.population] != [one.genome for one in start.population]
    assert account.used == 10
    fixed = loop.generation(replace(search, defects=frozenset()), account, start)
    assert [one.fitness for one in fixed.population] != [one.fitness for one in start.population]
    assert account.used == 20


def test_the_whole_released_search_runs(fleet):
    search = replace(PRESETS["genome+"], generations=3, defects=COMPAT["genome"])
    account = Account(Ledger(fleet, {"far": 1.0}))  # a fitness that is not negative
    assert evolve(search, account, 5).generations == 3


def test_it_ends_when_nothing_gets_better(fleet):
    class Flat:
        def map(self, jobs, done=None):
            results = [Outcome({"near": 0.0, "far": 0.0}) for _ in jobs]
            for index, result in enumerate(results):
                done(index, result)
            return results

    search = replace(PRESETS["genome"], patience=3)
    assert evolve(search, Account(Ledger(Flat(), WEIGHTS)), 5).generations == 3
    assert (
        evolve(replace(search, patience=None), Account(Ledger(Flat(), WEIGHTS)), 5).generations
        == 50
    )


def test_it_lives_with_scores_that_are_no_numbers():
    class Nothing:
        def map(self, jobs, done=None):
            results = [Outcome({"near": math.nan, "far": -math.inf}) for _ in jobs]
            for index, result in enumerate(results):
                done(index, result)
            return results

    for method in ("genome", "genome+"):
        account = Account(Ledger(Nothing(), WEIGHTS))
        evolved = evolve(replace(PRESETS[method], generations=3), account, 3)
        assert math.isnan(evolved.fitness)
        assert evolved.best is not None


def test_a_population_of_forty_is_forty_recipes(fleet):
    search = replace(PRESETS["genome+"], size=40, capacity=40, generations=2, longest=4)
    evolved = evolve(search, toy_account(fleet), 5)
    assert len(evolved.population) == 40
    genomes = [genome for one in evolved.population for genome in one.genomes()]
    assert max(genome.length for genome in genomes) <= 4
    assert all(len(genome.terms) <= 5 + 4 for genome in genomes)


def test_one_expert_is_a_population(fleet):
    evolved = evolve(replace(PRESETS["genome+"], generations=3), toy_account(fleet), 1)
    assert evolved.fitness >= toy_account(fleet).fitness([expert(0)])[0]
    with pytest.raises(ValueError, match="experts: expected at least 1, got 0"):
        evolve(STILL, toy_account(fleet), 0)


# Evaluations: counted, bounded, never twice.


def test_the_budget_is_kept_to_the_last_evaluation(fleet):
    free = toy_account(fleet)
    evolve(replace(PRESETS["genome"], generations=4, patience=None), free, 5)
    for budget in (1, 9, 10, 17):
        account = toy_account(fleet, budget)
        evolved = evolve(replace(PRESETS["genome"], patience=None), account, 5)
        assert account.used == budget
        assert list(evolved.history) == free.history[:budget]
    search = replace(PRESETS["genome"], budget=12)
    account = toy_account(fleet, 14)
    evolve(search, account, 5)
    assert account.used == 12


def test_equal_genomes_are_scored_once(tmp_path):
    with open_fleet(Toy(tmp_path)) as fleet:
        account = toy_account(fleet)
        a = mix([(expert(0), 0.5), (expert(1), 0.5)])
        b = mix([(expert(1), 0.5), (expert(0), 0.5)])
        first = account.fitness([a, b, a])
        assert first == account.fitness([b, a, b])
        assert (account.used, scored(tmp_path)) == (1, 1)
        other = Account(account.ledger)
        other.fitness([a])
        assert (other.used, scored(tmp_path)) == (1, 1)  # counts for it, is not computed again


def test_beyond_the_budget_there_is_no_fitness(fleet):
    account = toy_account(fleet, 2)
    fitness = account.fitness([expert(i) for i in range(4)])
    assert [math.isnan(f) for f in fitness] == [False, False, True, True]
    assert not math.isnan(account.fitness([expert(1)])[0])
    assert account.left == 0


def test_fitness_is_the_weighted_mean_of_the_tasks(fleet):
    ledger = Ledger(fleet, {"near": 3.0, "far": 1.0})
    assert ledger.fitness(Outcome({"near": 2.0, "far": -4.0})) == 0.5
    assert Ledger(fleet, WEIGHTS).fitness(Outcome({"near": 2.0, "far": math.nan})) == 2.0
    for weights in ({}, {"near": 0.0}, {"near": 1.0, "far": -1.0}):
        with pytest.raises(ValueError, match="weights: expected one per task"):
            Ledger(fleet, weights)
    with pytest.raises(ValueError, match="scorer: expected a score of task 'third', got none"):
        Ledger(fleet, {"third": 1.0}).outcomes([expert(0)])


def test_the_test_split_is_not_the_validation_split(fleet):
    ledger = Ledger(fleet, WEIGHTS)
    (a,), (b,) = ledger.outcomes([expert(0)]), ledger.outcomes([expert(0)], "test")
    assert a.scores["far"] - b.scores["far"] == pytest.approx(0.5)


# The same lineage, however it is computed.


def test_one_seed_is_one_lineage_for_any_workers_even_if_one_dies(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", workers=2, dies=True)
    assert (tmp_path / "b" / FINISHED / "died").exists()
    assert lineage(tmp_path / "a") == lineage(tmp_path / "b")
    states = [json.loads((tmp_path / x / "state.json").read_text()) for x in "ab"]
    assert states[0] == states[1]
    run(tmp_path / "c", search=replace(SEARCH, seed=1))
    assert lineage(tmp_path / "a") != lineage(tmp_path / "c")


def test_a_killed_run_goes_on_to_the_same_lineage(tmp_path):
    run(tmp_path / "whole")
    killed = tmp_path / "killed"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}"}
    command = [sys.executable, here / "genome_run.py", killed, "0.02"]
    process = subprocess.Popen(command, env=environment)
    total = scored(tmp_path / "whole" / FINISHED)
    while scored(killed / FINISHED) < total // 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = scored(killed / FINISHED)
    assert total // 2 <= before < total
    (killed / "evaluations.jsonl").open("a").write('{"genome": "torn')
    _, account = run(killed)
    assert lineage(killed) == lineage(tmp_path / "whole")
    again = scored(killed / FINISHED) - before
    assert again <= total - before + 1  # at most the one that was not written yet
    assert account.used == run(tmp_path / "whole")[1].used


def test_a_finished_run_can_go_on(tmp_path):
    run(tmp_path / "a", search=replace(SEARCH, generations=2))
    run(tmp_path / "a")
    run(tmp_path / "b")
    assert lineage(tmp_path / "a") == lineage(tmp_path / "b")


def test_a_workspace_belongs_to_one_search(tmp_path):
    run(tmp_path, search=replace(SEARCH, generations=1))
    with pytest.raises(ValueError, match="expected a run with this search"):
        run(tmp_path, search=replace(SEARCH, sigma=0.5))
    workspace = Workspace(tmp_path, SEARCH, {"pool": "another"})
    with pytest.raises(ValueError, match="expected a run with this pool in"):
        workspace.load(Account(None))


def test_finished_genomes_of_the_past_are_removed(tmp_path):
    run(tmp_path, search=replace(SEARCH, cross_method="ties", cross_rate=1.0))
    files = {path.stem for path in (tmp_path / FINISHED).glob("*.safetensors")}
    state = json.loads((tmp_path / "state.json").read_text())
    living = {one[place] for one in state["population"] for place in ("genome", "velocity", "best")}
    living |= {state["best"][0], state["worst"][0]}
    needed = {
        s for key in living & set(state["genomes"]) for s, _ in state["genomes"][key]["terms"]
    }
    assert needed & files
    ever = {json.loads(line)["genome"] for line in lineage(tmp_path).splitlines()}
    assert len(files) < len(ever) / 2


def test_progress_is_told_each_generation(fleet):
    told: list[tuple[int, int]] = []

    def tell(state: State, account: Account) -> None:
        told.append((state.generation, account.used))

    evolve(replace(PRESETS["genome"], generations=3), toy_account(fleet), 5, progress=tell)
    assert [generation for generation, _ in told] == [1, 2, 3]
    assert told[0][1] > 10
