"""Exits that are checked: the tokens of all loops, whatever left early."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_tiny import Double, tiny
from toy_models import PAGE, ToyModel, ToyRunner, collect, decode, drain

from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.sequential import Sequential

LENGTH = 80


@st.composite
def workloads(draw):
    loops = draw(st.integers(1, 3))
    drafts = draw(st.integers(1, 5))
    pressure = draw(st.sampled_from(["none", "reserve", "recompute"]))
    config = EngineConfig(
        width=draw(st.integers(1, 5)),
        requests=draw(st.integers(1, 6)),
        max_model_len=LENGTH,
        pages=draw(st.integers(math.ceil(LENGTH / PAGE), 12)),
        kv_policy=draw(st.sampled_from(["exact_lazy", "exact_eager"])),
        drafts=drafts,
        backlog=draw(st.integers(drafts, 6)),
        fill_rows=draw(st.integers(0, 3)),
        prefill_tokens=draw(st.integers(1, 40)),
        mixed=draw(st.booleans()),
        min_coda_batch=draw(st.integers(1, 4)),
        order=draw(st.sampled_from(["fifo", "deepest", "uniform"])),
        kv_pressure=pressure,
        margin=draw(st.sampled_from([0.0, 0.3])),
        prefix_cache=draw(st.booleans()),
        verify=True,
    )
    every = []
    for _ in range(draw(st.integers(1, 6))):
        count = draw(st.integers(0, 24))
        params = SamplingParams(
            max_tokens=count,
            temperature=draw(st.sampled_from([0.0, 1.0])),
            seed=draw(st.integers(-5, 5)),
            stop_ids=draw(st.sampled_from([(), (7,), tuple(range(0, 29, 3))])),
            exit_threshold=draw(st.sampled_from([None, 0.0, 0.5])),
            max_loops=draw(st.sampled_from([None, loops])),
        )
        prompt = tuple(draw(st.lists(st.integers(0, 28), min_size=1, max_size=30)))
        cancel = draw(st.one_of(st.none(), st.none(), st.integers(0, 60)))
        every.append((draw(st.integers(0, 30)), Request(prompt, params), cancel))
    return loops, config, sorted(every, key=lambda arrival: arrival[0])


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(workloads())
def test_any_workload_draws_the_tokens_of_all_loops(workload):
    loops, config, every = workload
    model = ToyModel(loops=loops, stored=1)
    engine = Engine(ToyRunner(model, config), config)
    ids, found, cancelled, tick = {}, {}, set(), 0
    waiting = list(every)
    while waiting or engine.has_work():
        while waiting and waiting[0][0] <= tick:
            arrival = waiting.pop(0)
            ids[engine.submit(arrival[1])] = arrival
        for id, (came, _, cancel) in ids.items():
            if cancel is not None and came + cancel == tick and not (id in found and found[id][2]):
                cancelled.add(id)
                engine.cancel(id)
        events = engine.step()
        assert not {event.request for event in events} & cancelled
        collect(found, events)
        engine.scheduler.check()
        tick += 1
        assert tick < 5000
    for id, (_, request, _) in ids.items():
        if id in cancelled:
            continue
        tokens, depths, reason = found[id]
        count = request.params.max_tokens
        wanted = decode(model, request, config, [loops] * count)[0] if count else []
        if reason == "error":
            assert config.kv_pressure == "none"
            assert tokens == wanted[: len(tokens)]
            continue
        assert tokens == wanted
        assert all(1 <= depth <= loops for depth in depths)
        stopped = tokens and tokens[-1] in request.params.stop_ids
        assert reason == ("stop" if stopped else "length")
    assert engine.scheduler.free_slots == config.slots
    assert engine.scheduler.free_pages == config.pages
    assert not any(engine.scheduler.queues().values())


@pytest.mark.parametrize("drafts", [1, 4])
@pytest.mark.parametrize(("name", "loops"), [("Gemma2", 2), ("Llama", 3)])
def test_outputs_are_those_of_the_full_model(name, loops, drafts):
    """Greedy, sampled, penalised and with log-probabilities, which are those of all loops too."""
    model = tiny(name, loops=loops, rank=3, layers=6 if loops == 3 else 4)
    test = ExitTest("max_prob", threshold=0.1)
    ways = (
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.5},
        {"temperature": 0.0, "frequency_penalty": 0.5},
        {"temperature": 1.0, "top_p": 0.9, "logprobs": 1},
    )
    asked = [
        Request((3 + i, 4, 5), SamplingParams(max_tokens=20, seed=i, **way))
        for i, way in enumerate(ways)
    ]
    config = EngineConfig(width=3, max_model_len=64, drafts=drafts, verify=True)
    engine = Engine.of_model(model, config, exits=test)
    ids = [engine.submit(request) for request in asked]
    told = {id: [] for id in ids}
    while engine.has_work():
        for event in engine.step():
            told[event.request].append(event.token)
        engine.scheduler.check()
    with Double():
        for id, request in zip(ids, asked, strict=True):
            whole = Sequential(model).decode(request)
            assert [token.id for token in told[id]] == [token.id for token in whole]
            for token, own in zip(told[id], whole, strict=True):
                if own.logprob is not None:
                    assert token.logprob == pytest.approx(own.logprob, rel=1e-9)
                    assert [t for t, _ in token.top] == [t for t, _ in own.top]
    counted = engine.scheduler.counters()
    assert counted["accepted"] > 0
    assert counted["rejected"] > 0
    early = sum(token.exit_depth < loops for tokens in told.values() for token in tokens)
    assert early == counted["accepted"]


def test_drafts_that_agree_save_steps_of_the_block():
    """Two loops that change nothing behind the first: every draft is the final token."""
    model = ToyModel(loops=3, stored=1)
    model.o, model.down = 0 * model.o, 0 * model.down
    steps = []
    for drafts in (0, 4):
        config = EngineConfig(width=4, max_model_len=LENGTH, drafts=drafts, verify=True)
        engine = Engine(ToyRunner(model, config), config)
        given_ = SamplingParams(max_tokens=40, temperature=0.0, exit_threshold=0.0)
        full = SamplingParams(max_tokens=40, temperature=0.0)
        id = engine.submit(Request((1, 2), given_ if drafts else full))
        found = drain(engine)
        assert found[id][0] == decode(model, Request((1, 2), full), config)[0]
        steps.append(engine.scheduler.counters()["blocks"])
    assert engine.scheduler.counters()["rejected"] == 0
    assert steps[1] < 0.6 * steps[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"drafts": -1}, "drafts: expected at least 0, got -1"),
        ({"drafts": 3, "backlog": 2}, "drafts: expected at most the backlog of 2, got 3"),
        ({"drafts": 1, "mode": "lockstep"}, "drafts: expected mode cdb with them"),
        ({"drafts": 1, "kv_policy": "copy"}, "drafts: expected kv_policy exact_lazy or exact_e"),
        ({"drafts": 1, "kv_pressure": "offload"}, "drafts: expected another kv_pressure than off"),
        ({"drafts": 1, "routing": "device"}, "routing: expected drafts 0 with 'device'"),
    ],
)
def test_what_drafts_need(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        EngineConfig(**options)
