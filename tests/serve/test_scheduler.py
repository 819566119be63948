"""Any workload under any settings: the tokens of one request after the other, and nothing lost."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_models import PAGE, ToyModel, ToyRunner, collect, decode, place_of

from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.policies import EXACT, POLICIES
from gemma_ext.serve.protocol import Request, SamplingParams

LENGTH = 80
SHARED = tuple(np.random.default_rng(3).integers(0, 29, size=40).tolist())


@st.composite
def configs(draw):
    policy = draw(st.sampled_from(POLICIES))
    exact = policy in EXACT
    pressure = draw(st.sampled_from(["none", "reserve", "recompute", "offload"]))
    if pressure == "recompute" and not exact:
        pressure = "offload"
    requests = draw(st.integers(1, 6))
    prefix = draw(st.booleans())
    return EngineConfig(
        width=draw(st.integers(1, 5)),
        requests=requests,
        max_model_len=LENGTH,
        pages=draw(st.integers(math.ceil(LENGTH / PAGE), 12)),
        mode=draw(st.sampled_from(["cdb", "cdb", "cdb", "csb", "lockstep", "static"])),
        kv_policy=policy,
        keep=draw(st.integers(1, 2)),
        backlog=draw(st.integers(1, 5)),
        fill_rows=draw(st.integers(0, 3)),
        prefill_tokens=draw(st.sampled_from([16, 32])) if not exact else draw(st.integers(1, 40)),
        mixed=draw(st.booleans()),
        min_coda_batch=draw(st.integers(1, 4)),
        min_free_requests=draw(st.integers(1, requests)),
        order=draw(st.sampled_from(["fifo", "deepest", "uniform"])),
        kv_pressure=pressure,
        margin=draw(st.sampled_from([0.0, 0.3])),
        prefix_cache=prefix,
        fill_on_finish=prefix and exact and draw(st.booleans()),
        verify=True,
    )


@st.composite
def arrivals(draw, loops):
    prompt = SHARED[: draw(st.integers(0, 40))] + tuple(
        draw(st.lists(st.integers(0, 28), min_size=1, max_size=8))
    )
    count = draw(st.integers(0, 24))
    least = draw(st.integers(1, loops))
    params = SamplingParams(
        max_tokens=count,
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(-5, 5)),
        stop_ids=draw(st.sampled_from([(), (7,), tuple(range(0, 29, 3))])),
        exit_threshold=draw(st.sampled_from([None, 0.0, 0.5])),
        min_loops=least,
        max_loops=draw(st.sampled_from([None, least, loops])),
    )
    depths = draw(st.lists(st.integers(1, loops), min_size=count, max_size=count))
    cancelled = draw(st.one_of(st.none(), st.none(), st.integers(0, 60)))
    return {
        "tick": draw(st.integers(0, 40)),
        "request": Request(prompt, params),
        "depths": depths if draw(st.booleans()) else None,
        "cancel": cancelled,
    }


@st.composite
def workloads(draw):
    loops = draw(st.integers(1, 3))
    every = draw(st.lists(arrivals(loops), min_size=1, max_size=8))
    return loops, draw(configs()), every


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(workloads())
def test_any_workload(workload):
    loops, config, every = workload
    model = ToyModel(loops=loops, stored=1)
    engine = Engine(ToyRunner(model, config), config)
    waiting = sorted(range(len(every)), key=lambda i: every[i]["tick"])
    ids, found, cancelled, tick = {}, {}, set(), 0
    while waiting or engine.has_work():
        while waiting and every[waiting[0]]["tick"] <= tick:
            arrival = every[waiting.pop(0)]
            ids[engine.submit(arrival["request"], arrival["depths"])] = arrival
        for id, arrival in ids.items():
            ended = id in found and found[id][2]
            due = arrival["cancel"] is not None and arrival["tick"] + arrival["cancel"] == tick
            if due and not ended:
                cancelled.add(id)
                engine.cancel(id)
                engine.cancel(id)
        events = engine.step()
        assert not {event.request for event in events} & cancelled
        collect(found, events)
        engine.scheduler.check()
        tick += 1
        assert tick < 5000
    for id, arrival in ids.items():
        if id in cancelled:
            continue
        tokens, depths, reason = found[id]
        if reason == "error":
            assert config.kv_pressure == "none"
            continue
        expected = expect(model, config, arrival)
        assert (tokens, depths) == expected
        stopped = tokens and tokens[-1] in arrival["request"].params.stop_ids
        assert reason == ("stop" if stopped else "length")
    scheduler = engine.scheduler
    assert scheduler.free_slots == config.slots
    assert scheduler.free_pages == config.pages
    assert not any(scheduler.queues().values())
    assert engine.runner.open_rows == {}
    assert len(engine.open) == 0
    conserve(engine, found, cancelled)


def expect(model, config, arrival):
    request, depths = arrival["request"], arrival["depths"]
    if request.params.max_tokens == 0:
        return [], []
    if config.mode in ("csb", "static"):
        depths = [model.loops] * request.params.max_tokens
    tokens, exits, _ = decode(model, request, config, depths)
    return tokens, exits


def conserve(engine, found, cancelled):
    """Loops that ran are loops that were read, where nothing ran twice or in vain."""
    counted = engine.scheduler.counters()
    depths = Counter()
    for tokens, exits, _ in found.values():
        depths.update(exits)
        assert len(tokens) == len(exits)
    exits = engine.stats().exits
    if not cancelled:
        assert [depths[j + 1] for j in range(len(exits))] == list(exits)
        assert counted["current_rows"] == counted["exit_loops"]
    if engine.config.kv_policy in EXACT:
        skipped = sum((len(exits) - depth) * n for depth, n in depths.items())
        assert counted["fill_rows"] <= skipped or cancelled or counted["preemptions"]
    else:
        assert counted["fill_rows"] == 0
    if engine.config.mode == "cdb" and engine.config.order == "fifo":
        ready = counted["most_ready"]
        turns = 1 if engine.config.mixed else 2
        if counted["fill_rows"] == 0:
            assert counted["most_wait"] <= turns * math.ceil(ready / engine.config.width) + turns


@pytest.mark.parametrize("eager", [False, True])
def test_keys_and_values_of_all_loops_are_those_of_a_full_pass(eager):
    """Behind exits, fills and a second request that shares the prefix."""
    config = EngineConfig(
        width=3, requests=8, max_model_len=LENGTH, prefix_cache=True, fill_on_finish=True,
        kv_policy="exact_eager" if eager else "exact_lazy", verify=True,
    )  # fmt: skip
    model = ToyModel(loops=3)
    runner = ToyRunner(model, config)
    engine = Engine(runner, config)
    tables = engine.scheduler.buffers()["block_tables"]
    expected, compared = {}, []
    close = runner.close

    def compare(row):
        request = runner.open_rows[row]
        tokens, _, kv = expected[request]
        count = len(request.prompt) + len(tokens) - 1
        for (loop, layer, pos), (k, v) in kv.items():
            page = runner.pool[place_of("", 1)(loop) * model.stored + layer]
            here = page[tables[row, pos // PAGE], :, 0, pos % PAGE]
            assert np.array_equal(here, np.stack([k, v])), (loop, layer, pos)
        assert {pos for *_, pos in kv} == set(range(count))
        compared.append(row)
        close(row)

    runner.close = compare
    for i in range(6):
        params = SamplingParams(max_tokens=12 + i, seed=i, exit_threshold=0.5)
        request = Request((*SHARED[: 16 + 4 * i], i), params)
        expected[request] = decode(model, request, config)
        engine.submit(request)
    while engine.has_work():
        engine.step()
    assert len(compared) == 6
    assert engine.scheduler.counters()["fill_rows"] > 0
    assert engine.scheduler.counters()["cached_tokens"] == 0  # all came at once
    again = Request(SHARED, SamplingParams(max_tokens=20, exit_threshold=0.5))
    expected[again] = decode(model, again, config)
    engine.submit(again)
    found = {}
    while engine.has_work():
        collect(found, engine.step())
    assert next(iter(found.values()))[:2] == expected[again][:2]
    assert engine.scheduler.counters()["cached_tokens"] == 32


def test_nothing_that_is_ready_waits_longer_than_its_turn():
    config = EngineConfig(width=2, requests=10, max_model_len=LENGTH)
    engine = Engine(ToyRunner(ToyModel(loops=3, stored=1), config), config)
    for i in range(10):
        engine.submit(Request((i,), SamplingParams(max_tokens=20)), [3] * 20)
    while engine.has_work():
        engine.step()
    counted = engine.scheduler.counters()
    assert counted["most_ready"] == 10
    assert 4 <= counted["most_wait"] <= 5 + 1


def test_steps_and_reports_come_in_turn():
    scheduler = EngineConfig(width=2, max_model_len=LENGTH).scheduler(loops=2)
    assert scheduler.plan() == ("idle", 0)
    with pytest.raises(RuntimeError, match="expected a report of the step that was planned"):
        scheduler.report_block(None)
    submit(scheduler)
    assert scheduler.plan() == ("block", 3)
    with pytest.raises(RuntimeError, match="the last step was not reported"):
        scheduler.plan()
    with pytest.raises(ValueError, match="exits: expected one for each row of the block"):
        scheduler.report_block(np.zeros(2, np.uint8))
    with pytest.raises(RuntimeError, match="expected a report of the step that was planned"):
        scheduler.report_coda(np.zeros(3, np.int32))
    scheduler.report_block(np.zeros(3, np.uint8))
    assert scheduler.plan() == ("block", 3)
    scheduler.report_block(None)
    assert scheduler.plan() == ("coda", 1)
    with pytest.raises(ValueError, match="tokens: expected one for each row of the coda"):
        scheduler.report_coda(np.zeros(2, np.int32))
    scheduler.report_coda(np.zeros(1, np.int32))
    assert scheduler.tokens(1) == [1, 2, 3, 0]
    assert scheduler.tokens(2) is None
    scheduler.check()


def submit(scheduler, **options):
    given = {"max_tokens": 4, "min_loops": 1, "max_loops": 2, "score": False}
    given |= {"stops": [], "depths": [], **options}
    return scheduler.submit(np.array([1, 2, 3], np.int32), **given)


def test_what_a_scheduler_refuses():
    scheduler = EngineConfig(width=2, max_model_len=LENGTH).scheduler(loops=2)
    with pytest.raises(ValueError, match="max_loops: expected 1 <= min_loops <= max_loops <= 2"):
        submit(scheduler, min_loops=2, max_loops=1)
    with pytest.raises(ValueError, match="prompt: expected at least one token, got none"):
        scheduler.submit(
            np.zeros(0, np.int32), max_tokens=1, min_loops=1, max_loops=1, score=False,
            stops=[], depths=[],
        )  # fmt: skip
    with pytest.raises(ValueError, match=f"prompt: expected at most {LENGTH} tokens of prompt and"):
        submit(scheduler, max_tokens=LENGTH)
    assert not scheduler.has_work()
    with pytest.raises(ValueError, match="loops: expected at most 255, got 256"):
        EngineConfig().scheduler(loops=256)
    with pytest.raises(ValueError, match="loops: expected at least 1, got 0"):
        EngineConfig().scheduler(loops=0)


def test_a_prefix_outlives_the_eviction_of_its_first_page():
    """A request whose first page is another's publishes the rest again once that is gone."""
    config = EngineConfig(
        width=4, max_model_len=160, pages=10, requests=4, prefix_cache=True, verify=True
    )
    model = ToyModel(loops=1, seed=2)
    engine, found = Engine(ToyRunner(model, config), config), {}

    def serve(prompt, count):
        request = Request(prompt, SamplingParams(max_tokens=count, temperature=0.0))
        return engine.submit(request), request

    def step_while(going):
        while going():
            collect(found, engine.step())
            engine.scheduler.check()

    shared = (1,) * 16
    first, _ = serve(shared + (2,) * 17, 1)
    serve(shared + (3,) * 17, 40)  # in a page of its own, beside the same one of the first
    step_while(lambda: engine.scheduler.tokens(first))
    serve((5,) * 70, 10)  # takes the page of the first
    step_while(engine.has_work)
    random = np.random.default_rng(1)
    long, _ = serve(tuple(random.integers(0, 29, size=127).tolist()), 1)
    serve(tuple(random.integers(0, 29, size=4).tolist()), 12)
    step_while(lambda: engine.scheduler.tokens(long))
    again, request = serve(shared + (3,) * 17, 6)
    step_while(engine.has_work)
    assert found[again][0] == decode(model, request, config)[0]
    assert engine.scheduler.free_pages == config.pages


@pytest.mark.parametrize("policy", ["single", "modulo", "first_then_shared"])
def test_pages_of_all_loops_serve_no_request_of_fewer_where_loops_share_them(policy):
    config = EngineConfig(
        width=2, max_model_len=LENGTH, kv_policy=policy, prefill_tokens=16, prefix_cache=True
    )
    model = ToyModel(loops=3)
    engine, found = Engine(ToyRunner(model, config), config), {}
    for loops, cached in ((3, 0), (1, 0), (3, 32)):
        before = engine.scheduler.counters()["cached_tokens"]
        params = SamplingParams(max_tokens=5, temperature=0.0, max_loops=loops)
        request = Request(SHARED, params)
        id = engine.submit(request)
        while engine.has_work():
            collect(found, engine.step())
        assert engine.scheduler.counters()["cached_tokens"] - before == cached
        assert found[id][0] == decode(model, request, config)[0]
