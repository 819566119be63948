"""FREE's adaptive threshold: the crossing of two Beta densities, and in an engine whose exits are
drafts."""

import numpy as np
import pytest
from scipy import optimize, stats
from serve_tiny import Double, tiny

from gemma_ext.serve.adaptive import EVERY, LEAST, WINDOW, AdaptiveThreshold
from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.sequential import Sequential


@pytest.mark.parametrize("zeta", [0.2, 0.4, 0.7])
def test_the_threshold_is_where_the_densities_cross(zeta):
    rng = np.random.default_rng(1)
    wrong, right = stats.beta(2, 5), stats.beta(6, 2)
    threshold = AdaptiveThreshold(zeta)
    threshold.add(wrong.rvs(WINDOW // 2, random_state=rng), np.zeros(WINDOW // 2, bool))
    threshold.add(right.rvs(WINDOW // 2, random_state=rng), np.ones(WINDOW // 2, bool))

    def gap(c):
        return right.pdf(c) / (right.pdf(c) + wrong.pdf(c)) - zeta

    assert threshold.value == pytest.approx(optimize.brentq(gap, 0.05, 0.95), abs=0.02)


def test_it_waits_for_pairs_of_both_classes_and_forgets_old_ones():
    threshold = AdaptiveThreshold()
    rng = np.random.default_rng(2)
    threshold.add(rng.uniform(0.5, 1, size=4 * EVERY), np.ones(4 * EVERY, bool))
    assert threshold.value is None
    threshold.add(np.full(EVERY, np.nan), np.zeros(EVERY, bool))
    assert threshold.value is None
    threshold.add(np.full(EVERY, 0.3), np.zeros(EVERY, bool))
    assert threshold.value is None  # all alike: no density
    threshold.add(rng.uniform(0, 0.5, size=max(EVERY, LEAST)), np.zeros(max(EVERY, LEAST), bool))
    first = threshold.value
    assert 0.3 < first < 0.7
    low = rng.uniform(0.1, 0.2, size=WINDOW)
    threshold.add(low, rng.uniform(0.1, 0.2, size=WINDOW) < low)
    assert threshold.value < first


def test_where_nothing_is_right_nothing_leaves():
    threshold = AdaptiveThreshold(0.4)
    rng = np.random.default_rng(3)
    threshold.add(rng.beta(8, 2, size=500), np.zeros(500, bool))
    threshold.add(rng.beta(2, 8, size=500), np.ones(500, bool))
    assert threshold.value == 1.0


@pytest.mark.parametrize("name", ["max_prob", "margin"])
def test_an_engine_learns_it_and_draws_the_tokens_of_all_loops(name):
    model = tiny("Gemma2", loops=2, rank=3)
    config = EngineConfig(width=4, max_model_len=96, drafts=3, verify=True)
    engine = Engine.of_model(model, config, exits=ExitTest(name, threshold=0.01, adapt=0.5))
    asked = [
        Request((i, 3), SamplingParams(max_tokens=40, temperature=float(i % 2), seed=i))
        for i in range(6)
    ]
    asked.append(Request((9,), SamplingParams(max_tokens=20, exit_threshold=0.0)))
    ids = [engine.submit(request) for request in asked]
    told = {id: [] for id in ids}
    while engine.has_work():
        for event in engine.step():
            told[event.request].append(event.token)
    value = engine.runner.exits.adaptive.value
    assert value is not None
    assert value != 0.01
    pairs = list(engine.runner.exits.adaptive._pairs)
    assert {right for _, right in pairs} == {False, True}
    counted = engine.scheduler.counters()
    assert counted["accepted"] > 0
    with Double():
        for id, request in zip(ids, asked, strict=True):
            whole = Sequential(model).decode(request)
            assert [token.id for token in told[id]] == [token.id for token in whole]


def test_what_it_needs():
    with pytest.raises(ValueError, match=r"^adapt: expected a share in \[0, 1\), got 1"):
        ExitTest("max_prob", threshold=0.5, adapt=1)
    with pytest.raises(ValueError, match=r"^adapt: expected exit test max_prob or margin with it"):
        ExitTest("entropy", threshold=0.5, adapt=0.4)
    test = ExitTest("max_prob", threshold=0.5, adapt=0.4)
    with pytest.raises(ValueError, match=r"^adapt: expected drafts of at least 1 with it, got 0"):
        Engine.of_model(tiny("Llama"), EngineConfig(max_model_len=32), exits=test)
