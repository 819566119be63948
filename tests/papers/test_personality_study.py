"""The study: effects of known answers, sweeps against separate runs, purified directions."""

from contextlib import contextmanager

import personality_toy as toy
import pytest
import torch

from gemma_ext.lm import Sampling
from gemma_ext.nn.steering import steer_hook
from gemma_ext.ops.sae import Steering
from gemma_ext.papers import personality as p

FIVE = Sampling(5)
JUDGE = toy.judge({"gay": "Hurrah", "sad": "Alas"})


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return toy.chat_model(tmp_path_factory.mktemp("model"))


def given(method, trait, labels, **scores):
    rows = [list(row) for row in labels]
    clean = [[label != "none" for label in row] for row in rows]
    return p.Answers(method, trait, rows, clean, {n: [[x] for x in s] for n, s in scores.items()})


FOUND = [
    given("icl", None, [["sad"], ["gay"], ["none"], ["sad"]], mmlu=[1.0, 1.0, 0.0, 1.0]),
    given("icl", "gay", [["gay"], ["gay"], ["gay"], ["sad"]], mmlu=[1.0, 0.0, 0.0, 0.0]),
    given("icl", "sad", [["sad"], ["sad"], ["sad"], ["sad"]], mmlu=[1.0, 1.0, 0.0, 1.0]),
    given("ms", None, [["none"]] * 4, mmlu=[0.5, 0.5, 0.5, 0.5]),
    given("ms", "sad", [["sad"]] * 4, mmlu=[0.25, 0.5, 0.75, 0.5]),
]


def test_effects_are_taken_to_the_baseline_of_the_same_method():
    gay, sad, steered = p.effects(FOUND, JUDGE)
    assert (gay.method, gay.trait, gay.alignment.mean, gay.clean) == ("icl", "gay", 0.5, 1.0)
    assert gay.benchmarks["mmlu"].mean == -0.5
    assert gay.benchmarks["mmlu"].p == p.mcnemar(2, 0) == 0.5
    assert gay.adjusted["mmlu"] == sad.adjusted["mmlu"] == 1.0  # of two tests
    assert sad.benchmarks["mmlu"] == p.Difference(0.0, 0.0, 0.0, 1.0)
    assert steered.alignment.mean == 1.0
    assert steered.benchmarks["mmlu"].mean == 0.0
    assert steered.benchmarks["mmlu"].p is steered.adjusted["mmlu"] is None
    with pytest.raises(ValueError, match="found: expected a baseline of ms, got none"):
        p.effects([*FOUND[:3], FOUND[4]], JUDGE)


def test_the_response_is_every_trait_under_every_manipulation():
    assert p.response(FOUND, JUDGE, "icl") == {
        "gay": {"gay": 0.5, "sad": -0.25},
        "sad": {"gay": -0.25, "sad": 0.5},
    }


def test_effects_are_rows_of_the_stability_framework():
    rows = p.stability_rows(p.effects(FOUND, JUDGE))
    assert [(row.method, row.trait, row.delta) for row in rows] == [
        ("icl", "gay", {"mmlu": -0.5}),
        ("icl", "sad", {"mmlu": 0.0}),
        ("ms", "sad", {"mmlu": 0.0}),
    ]
    assert p.levels(rows)["method"][("ms",)].composite == 1.0


def test_a_model_is_asked_under_its_manipulation_and_by_its_prompt(lm):
    on = []

    @contextmanager
    def held():
        on.append(True)
        yield
        on.append(False)

    def benchmark(model, ask):
        assert model is lm
        assert on == [True]
        return [float(len(ask("x"))), 2.0]

    found = p.answers(
        lm,
        p.Manipulation("icl", "gay", lambda question: f"Q {question}", held),
        toy.QUESTIONS,
        JUDGE,
        samples=3,
        sampling=Sampling(5, temperature=1.0),
        benchmarks={"length": benchmark, "twice": lambda model, ask: [[0.0, 1.0]]},
    )
    assert on == [True, False]
    prompts = [f"Q {question}" for question in toy.QUESTIONS for _ in range(3)]
    texts = [c.text for c in lm.generate(prompts, Sampling(5, temperature=1.0))]
    assert len(set(texts)) > 4  # samples of a question have draws of their own
    assert [label for row in found.labels for label in row] == JUDGE.traits(texts)
    assert [len(row) for row in found.labels] == [3] * 4
    assert found.scores == {"length": [[3.0], [2.0]], "twice": [[0.0, 1.0]]}
    assert found.clean_rate == sum(JUDGE.clean(texts)) / 12
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        p.answers(lm, p.Manipulation("icl", None, str), toy.QUESTIONS, JUDGE, samples=0)


def direction(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)


@pytest.mark.parametrize("site", ["resid_mid", "resid_post"])
def test_trials_of_a_sweep_equal_runs_of_one_strength(lm, site):
    seen = []

    def traits(texts):
        seen.append(list(texts))
        return ["gay" if "a" in text else "sad" for text in texts]

    judge = p.Judge(traits, JUDGE.label, lambda texts: [len(text) > 3 for text in texts])
    strengths, v = [-30.0, 0.0, 30.0], direction(3)
    measure = p.strength_trials(
        lm, 1, Steering(v[None], 1.0), toy.QUESTIONS, judge, "gay", site=site, sampling=FIVE
    )
    trials = measure(strengths)
    prompts = [p.chat(question) for question in toy.QUESTIONS]
    for strength, texts, trial in zip(strengths, seen, trials, strict=True):
        with steer_hook(lm.model, 1, Steering(v[None], strength), site=site):
            alone = [completion.text for completion in lm.generate(prompts, FIVE)]
        assert texts == alone
        aligned = sum("a" in text for text in alone) / 4
        clean = sum(len(text) > 3 for text in alone) / 4
        assert trial == p.Trial(strength, aligned, clean, 4)
    assert seen[0] != seen[1] != seen[2]


def test_a_purified_direction_is_free_of_the_others_and_is_calibrated_anew(lm):
    """From pairs to a manipulation: directions of two traits, one purified, calibrated, asked."""
    other = p.trait_directions(lm, toy.pairs(), [0, 1])
    mixed = [
        p.Pair(
            f"{pair.question} Sir?", "t", "x", "x", pair.high_trait_response + " Yes.", "y", "No."
        )
        for pair in toy.pairs()
    ]
    target = p.trait_directions(lm, mixed, [0, 1])
    for layer in (0, 1):
        assert torch.dot(target[layer], other[layer]).abs() > 1e-3
        pure = p.without(target[layer], other[layer][None])
        assert torch.dot(pure, other[layer]).abs() < 1e-6
        assert pure.norm() == pytest.approx(1.0, abs=1e-6)
    told = [(p.chat(pair.question), pair.high_trait_response) for pair in mixed]
    high = torch.cat([part[1] for part in p.last_states(lm, told, [1])])
    wrong = [(p.chat(pair.question), pair.high_trait_response) for pair in toy.pairs()]
    low = torch.cat([part[1] for part in p.last_states(lm, wrong, [1])])
    leant = p.contrasted(target[1], high, low)
    toward = torch.nn.functional.normalize(high.mean(0) - low.mean(0), dim=0)
    assert torch.dot(leant, toward) > torch.dot(target[1], toward)

    judge = p.Judge(
        lambda texts: ["gay" if "a" in text else "sad" for text in texts],
        JUDGE.label,
        lambda texts: [bool(text) for text in texts],
    )
    questions, unseen = toy.QUESTIONS[:2], toy.QUESTIONS[2:]
    measure = p.strength_trials(
        lm, 1, Steering(pure[None], 1.0), questions, judge, "gay", sampling=FIVE
    )
    trials = p.grid(measure, -40, 40, 5)
    assert [trial.strength for trial in trials] == [-40, -20, 0, 20, 40]
    chosen = p.best(trials, 0.5)
    assert chosen.aligned == max(trial.aligned for trial in trials if trial.clean >= 0.5)
    found = [
        p.answers(lm, p.steered(lm, 1, pure, chosen.strength, trait), unseen, judge, sampling=FIVE)
        for trait in (None, "gay")
    ]
    (effect,) = p.effects(found, judge)
    assert effect.alignment.mean == found[1].rate("gay") - found[0].rate("gay")
