"""The engine over scripted runners: tokens, depths, and who holds what afterwards."""

import numpy as np
import pytest
from toy_models import CountingRunner, ToyModel, ToyRunner, decode, drain

from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.protocol import Request, SamplingParams


def greedy(count, **options):
    return SamplingParams(max_tokens=count, temperature=0.0, **options)


def empty(engine):
    """Nothing is held by anybody."""
    scheduler, config = engine.scheduler, engine.config
    scheduler.check()
    assert scheduler.free_pages == config.pages
    assert scheduler.free_slots == config.slots
    assert not any(scheduler.queues().values())
    assert engine.runner.open_rows == {}
    assert engine._requests == {}
    assert engine.store.bytes == 0


@pytest.mark.parametrize(
    ("depth", "ran", "outputs"),
    [(1, 4, [[5, 6, 7], [8, 9, 10]]), (3, 12, [[5, 8, 11], [8, 11, 14]])],
)
def test_replayed_exits_of_the_counting_model(depth, ran, outputs):
    model, config = ToyModel(loops=3, vocabulary=16), EngineConfig(width=4, verify=True)
    engine = Engine(CountingRunner(model, config), config)
    for prompt in ((1, 2), (5,)):
        engine.submit(Request(prompt, greedy(3)), exit_depths=[depth] * 3)
    found = drain(engine)
    assert [found[id][0] for id in (1, 2)] == outputs
    assert [found[id][1] for id in (1, 2)] == [[3, depth, depth]] * 2
    assert engine.scheduler.counters()["current_rows"] == ran
    assert engine.scheduler.counters()["exit_loops"] == ran
    empty(engine)


@pytest.mark.parametrize(
    "policy",
    [
        "exact_lazy",
        "exact_eager",
        "propagate",
        "copy",
        "single",
        "first_then_shared",
        "modulo",
        "active_only",
    ],
)
def test_tokens_and_depths_are_those_of_one_request_after_the_other(policy):
    model = ToyModel(loops=3)
    config = EngineConfig(
        width=3, max_model_len=64, prefill_tokens=16, kv_policy=policy, keep=2, verify=True
    )
    rng = np.random.default_rng(0)
    requests = [
        Request(
            tuple(rng.integers(0, 29, size=rng.integers(1, 30)).tolist()),
            SamplingParams(
                max_tokens=int(rng.integers(1, 20)), temperature=float(i % 2), seed=i,
                exit_threshold=0.5,
            ),
        )
        for i in range(8)
    ]  # fmt: skip
    engine = Engine(ToyRunner(model, config), config)
    ids = [engine.submit(request) for request in requests]
    found = drain(engine)
    for id, request in zip(ids, requests, strict=True):
        tokens, depths, _ = decode(model, request, config)
        assert (found[id][0], found[id][1]) == (tokens, depths)
    assert len({depth for id in ids for depth in found[id][1][1:]}) > 1
    empty(engine)
