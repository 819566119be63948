"""Baselines at an equal number of evaluations, and the table they end in."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from genome_toy import MIX, WEIGHTS, Toy, scored, toy_pool

from gemma_ext.distributed.fleet import open_fleet
from gemma_ext.papers.genome import baselines
from gemma_ext.papers.genome.compare import baseline, ensemble, searched
from gemma_ext.papers.genome.config import PRESETS
from gemma_ext.papers.genome.evaluation import Account, Ledger, Outcome
from gemma_ext.papers.genome.materialise import Materialiser
from gemma_ext.papers.genome.recipe import expert, mix
from gemma_ext.papers.genome.search import evolve


@pytest.fixture
def fleet():
    with open_fleet(Toy()) as fleet:
        yield fleet


class Scorer:
    """A fleet of one function from weights over the experts to a score."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def map(self, jobs, done=None):
        for index, job in enumerate(jobs):
            weights = dict(job.genome.terms)
            self.asked.append([weights.get(i, 0.0) for i in range(5)])
            done(index, Outcome({"near": self.function(self.asked[-1])}))


@pytest.mark.parametrize("name", baselines.BASELINES)
@pytest.mark.parametrize("budget", [1, 12, 30])
def test_no_baseline_asks_for_more_than_its_budget(name, budget):
    scorer = Scorer(lambda w: -sum((a - b) ** 2 for a, b in zip(w, MIX, strict=True)))
    account = Account(Ledger(scorer, {"near": 1.0}), budget)
    baselines.BASELINES[name](account, 5, 7)
    assert 1 <= account.used <= budget
    fixed = {"best parent": 5, "uniform soup": 1}.get(name)
    if fixed is not None:
        assert account.used == min(fixed, budget)
    elif name != "model swarms":  # which may lose its patience
        assert account.used == budget
    genome, fitness = account.best
    assert fitness == account.fitness([genome])[0]


def test_searches_find_a_planted_mix(fleet):
    uniform = Account(Ledger(fleet, WEIGHTS))
    baselines.uniform_soup(uniform, 5)
    for name in ("random search", "lorahub", "model swarms"):
        account = Account(uniform.ledger, 150)
        baselines.BASELINES[name](account, 5, 0)
        assert account.best[1] > uniform.best[1] / 2, name  # negative: less than half as far


def test_the_best_parent_is_the_best_expert(fleet):
    account = Account(Ledger(fleet, WEIGHTS))
    baselines.best_parent(account, 5)
    assert account.best[0] == expert(0)


def test_lorahub_penalises_large_weights_and_the_release_rewards_them():
    flat = Account(Ledger(Scorer(lambda w: 1.0), {"near": 1.0}), 40)
    baselines.lorahub(flat, 5, 0)
    assert flat.best[0] == mix([])
    released = Account(Ledger(Scorer(lambda w: 1.0), {"near": 1.0}), 40)
    baselines.lorahub(released, 5, 0, sign=1.0)
    weights = [abs(w) for _, w in released.best[0].terms]
    assert sum(weights) / 5 > 0.5
    assert all(w <= baselines.LORAHUB_BOUND + 1e-9 for w in weights)
    # 0.05 mean |w| of a loss in nats: an expert is taken where it lowers that by more than 0.01 w
    for gain, taken in ((0.02, True), (0.005, False)):
        scorer = Scorer(lambda w, gain=gain: 1e-3 * math.exp(gain * min(max(w[2], 0.0), 1.0)))
        nats = Account(Ledger(scorer, {"near": 1.0}), 60)
        baselines.lorahub(nats, 5, 0)
        assert (dict(nats.best[0].terms).get(2, 0.0) > 0.5) == taken
    scorer = Scorer(lambda w: math.nan)
    nothing = Account(Ledger(scorer, {"near": 1.0}), 10)
    baselines.lorahub(nothing, 5, 0)
    assert all(abs(w) <= baselines.LORAHUB_BOUND + 1e-9 for ws in scorer.asked for w in ws)


def test_model_swarms_restart_stray_particles_at_their_best():
    """A fitness that only experts have: every particle is sent home, and the search gives up."""
    account = Account(Ledger(Scorer(lambda w: float(sorted(w) == [0, 0, 0, 0, 1])), {"near": 1.0}))
    swarm = baselines.Swarm(patience=6)
    baselines.model_swarms(account, 5, 0, swarm)
    assert account.used <= 5 + 6 * 5
    assert account.best[1] == 1.0


def test_static_merges_begin_with_the_published_options(fleet):
    account = Account(Ledger(fleet, WEIGHTS), 1)
    baselines.ties(account, 5)
    (key,) = account.record()["fitness"]
    pool = toy_pool()
    x = torch.stack([e["x"].double().flatten() for e in pool.experts])
    kept = torch.zeros_like(x).scatter(1, x.abs().topk(int(0.2 * 24)).indices, 1.0) * x
    sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agree = kept.sign() == sign
    want = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
    made = Materialiser(pool).tensors(account.best[0])["x"].double().flatten()
    assert account.best[0].key == key
    torch.testing.assert_close(made, want, rtol=1e-6, atol=1e-6)


def test_the_table_of_a_comparison(tmp_path):
    search = replace(PRESETS["genome+"], generations=2, seed=5)
    with open_fleet(Toy(tmp_path)) as fleet:
        ledger = Ledger(fleet, WEIGHTS, tmp_path / "evaluations.jsonl")
        account = Account(ledger)
        evolved = evolve(search, account, 5)
        row = searched(ledger, search, evolved)
        assert (row.method, row.used) == ("genome+", account.used)
        assert row.genome == evolved.best
        assert row.test == row.scores["near"]
        tests = (tmp_path / "scored").read_text().splitlines().count("test")
        assert tests == 1  # the choice, and nothing before it
        rows = [baseline(ledger, name, 5, account.used, search) for name in baselines.BASELINES]
        assert all(r.used <= account.used for r in rows)
        assert json.loads(json.dumps(row.record()))["genome"] == evolved.best.key
        assert ensemble(ledger, search, evolved, 3) is None
        with pytest.raises(
            ValueError, match=r"baselines: expected one of best parent.*got 'prayer'"
        ):
            baseline(ledger, "prayer", 5, 3, search)
    before = scored(tmp_path)
    with open_fleet(Toy(tmp_path)) as fleet:  # everything is in the file
        ledger = Ledger(fleet, WEIGHTS, tmp_path / "evaluations.jsonl")
        assert baseline(ledger, "ties", 5, account.used, search) == rows[3]
    assert scored(tmp_path) == before


class Voters:
    """Validation and test disagree; the second expert is best on the test split."""

    right = ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0])
    answers = (["a", "x", "x"], ["a", "b", "x"], ["z", "x", "c"])

    def map(self, jobs, done=None):
        for index, job in enumerate(jobs):
            i = job.genome.terms[0][0]
            score = sum(self.right[i]) / 3 if job.split == "test" else 1.0 - i / 10
            made = Outcome({"t": score}, {"t": self.answers[i]}, {"t": self.right[i]})
            done(index, made)


def test_members_are_chosen_by_validation_and_the_release_chose_by_test():
    search = replace(PRESETS["genome"], start="experts", generations=0)
    ledger = Ledger(Voters(), {"t": 1.0})
    evolved = evolve(search, Account(ledger), 3)
    assert searched(ledger, search, evolved).genome == expert(0)
    row = ensemble(ledger, search, evolved, 3)
    assert row.scores == {"t": 1 / 3}  # a, x, x
    assert row.method == "genome, vote of 3"
    assert ensemble(ledger, search, evolved, 3, free_text=["t"]).scores == {"t": 1 / 3}
    released = replace(search, defects=frozenset({"oracle_vote", "chosen_by_test"}))
    assert searched(ledger, released, evolved).genome == expert(1)
    assert ensemble(ledger, released, evolved, 3).scores == {"t": 1.0}
    assert ensemble(ledger, released, evolved, 1).scores == {"t": 2 / 3}
