"""The engine over scripted runners: tokens, depths, and who holds what afterwards."""

import json

import numpy as np
import pytest
from toy_models import CountingRunner, ToyModel, ToyRunner, decode, drain

from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.trace import Trace, to_chrome


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
    assert len(engine.open) == 0
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


def toy_engine(loops=2, seed=0, **options):
    given = {"width": 4, "max_model_len": 64, "verify": True, **options}
    config = EngineConfig(**given)
    return Engine(ToyRunner(ToyModel(loops=loops, seed=seed), config), config)


def test_the_worked_timeline():
    """Section 4.7: E leaves after loop 1, D needs loop 2; new tokens join at the next loop."""
    letters = {"a": "EDE", "b": "DEE", "c": "EEE", "d": "EEE"}
    model, config = ToyModel(loops=2, vocabulary=29), EngineConfig(width=4, requests=4, verify=True)
    runner = CountingRunner(model, config)
    steps, block = [], runner.block

    def record(rows):
        steps.append(
            [
                (kind, row, pos, loop + 1)
                for kind, row, pos, loop in zip(
                    rows.kind.tolist(), rows.req.tolist(), rows.pos.tolist(), rows.loop.tolist(),
                    strict=True,
                )
                if kind != 2
            ]
        )  # fmt: skip
        return block(rows)

    runner.block = record
    engine = Engine(runner, config)
    for depths in letters.values():
        exits = [2, *({"E": 1, "D": 2}[letter] for letter in depths)]
        engine.submit(Request((1,), greedy(4)), exit_depths=exits)
    drain(engine)
    a, b, c, d = range(4)
    current, fill = 0, 1
    steps = [step for step in steps if step]
    assert steps[0] == [(current, row, 1, 1) for row in (a, b, c, d)]
    assert sorted(steps[1]) == sorted(
        [(current, b, 1, 2), (current, a, 2, 1), (current, c, 2, 1), (current, d, 2, 1)]
    )
    # a's first token joins its second at loop 2; W counts current tokens alone
    assert (fill, a, 1, 2) in steps[2]
    assert (current, a, 2, 2) in steps[2]
    assert {row for kind, row, *_ in steps[2] if kind == current} == {a, b, c, d}


@pytest.mark.parametrize("mode", ["csb", "static"])
def test_modes_without_exits_run_every_loop(mode):
    engine = toy_engine(3, mode=mode)
    request = Request((1, 2, 3), greedy(9, exit_threshold=0.0))
    id = engine.submit(request)
    tokens, depths, _ = drain(engine)[id]
    assert depths == [3] * 9
    assert tokens == decode(engine.runner.model, request, engine.config, [3] * 9)[0]
    assert engine.stats().exits == (0, 0, 9)


def test_a_pass_of_lockstep_is_not_refilled():
    engine = toy_engine(3, mode="lockstep", width=2)
    for i in range(4):
        engine.submit(Request((i,), greedy(8)), exit_depths=[1 + i % 3] * 8)
    drain(engine)
    counted = engine.scheduler.counters()
    assert counted["mixed_blocks"] == 0 or counted["fill_rows"] > 0
    assert counted["blocks"] > counted["current_rows"] / 2


@pytest.mark.parametrize("pressure", ["recompute", "offload"])
def test_requests_that_find_no_page_wait_and_come_back(pressure):
    engine = toy_engine(
        3, kv_pressure=pressure, pages=5, requests=3, margin=0.0, max_model_len=64, width=3
    )
    requests = [
        Request((i, 1, 2), SamplingParams(max_tokens=40, seed=i, exit_threshold=0.5))
        for i in range(3)
    ]
    ids = [engine.submit(request) for request in requests]
    found = drain(engine)
    for id, request in zip(ids, requests, strict=True):
        tokens, depths, _ = decode(engine.runner.model, request, engine.config)
        assert (found[id][0], found[id][1]) == (tokens, depths)
    counted = engine.scheduler.counters()
    assert counted["preemptions" if pressure == "recompute" else "offloads"] > 0
    assert engine.stats().preemptions > 0
    empty(engine)


def test_without_a_remedy_the_shortest_request_ends_with_a_sentence():
    engine = toy_engine(kv_pressure="none", pages=4, requests=2, margin=0.0)
    short = engine.submit(Request((1,), greedy(40)))
    long = engine.submit(Request((1,) * 20, greedy(40)))
    events, found = [], {}
    while engine.has_work():
        events += engine.step()
    for event in events:
        found[event.request] = event
    assert found[long].finish_reason == "length"
    assert found[short].finish_reason == "error"
    assert found[short].error == "the KV pool has no page left for this request"
    empty(engine)


def test_a_backlog_is_bounded():
    engine = toy_engine(3, backlog=3, width=2)
    most = 0
    for i in range(3):
        engine.submit(Request((i,), greedy(30)), exit_depths=[3] + [1] * 29)
    while engine.has_work():
        engine.step()
        most = max(most, engine.config.slots - engine.scheduler.free_slots)
        engine.scheduler.check()
    assert most <= 3 * (3 + 2)
    assert engine.scheduler.counters()["fill_rows"] > 0


def test_a_step_has_room_for_what_a_deep_token_finds_owed():
    def held(**options):
        engine = toy_engine(2, width=1, requests=1, **options)
        engine.submit(Request((1, 2), greedy(30)), exit_depths=([1] * 14 + [2]) * 2)
        drain(engine)
        return engine.scheduler.counters()["most_wait"]

    assert held(fill_rows=1) > 0
    assert held() == 0


@pytest.mark.parametrize(
    ("policy", "loops", "rows"), [("exact_lazy", 2, 24), ("exact_lazy", 1, 4), ("copy", 2, 4)]
)
def test_blocks_of_a_device_have_rows_for_fills_where_there_are_some(policy, loops, rows):
    config = EngineConfig(width=4, max_model_len=32, kv_policy=policy, routing="device")
    assert config.shape(loops).rows == rows


def test_a_loop_that_is_never_reached_is_never_filled():
    engine = toy_engine(3, backlog=3)
    engine.submit(Request((1, 2), greedy(20, max_loops=1)))
    drain(engine)
    assert engine.scheduler.counters()["fill_rows"] == 0


def test_prefixes_are_shared_by_revision_and_policy():
    keys = set()
    for revision, policy in (("a", "exact_lazy"), ("b", "exact_lazy"), ("a", "copy")):
        config = EngineConfig(max_model_len=64, prefix_cache=True, kv_policy=policy)
        engine = Engine(ToyRunner(ToyModel(), config), config, revision=revision)
        first = engine.submit(Request(tuple(range(20)), greedy(4)))
        while engine.scheduler.published_pages == 0:
            engine.step()
        (key, rest) = engine.scheduler.page_keys(first)
        assert key
        assert rest == 0
        keys.add(key)
        drain(engine)
        engine.submit(Request((*range(18), 7), greedy(4)))
        drain(engine)
        assert engine.stats().cached_tokens == 16
    assert len(keys) == 3


def test_finished_outputs_are_shared_once_they_are_filled():
    for fill in (False, True):
        engine = toy_engine(3, prefix_cache=True, fill_on_finish=fill)
        request = Request((1, 2), greedy(40))
        id = engine.submit(request, exit_depths=[1] * 40)
        tokens = drain(engine)[id][0]
        again = (1, 2, *tokens)
        engine.submit(Request(again, greedy(2)))
        drain(engine)
        assert engine.stats().cached_tokens == (32 if fill else 0)
        empty(engine)
        engine.scheduler.forget_prefixes()
        assert engine.scheduler.published_pages == 0
        engine.scheduler.check()


def test_prompts_are_scored_in_chunks():
    engine = toy_engine(2, prefill_tokens=5, prefix_cache=True)
    prompt = tuple(range(1, 20))
    for _ in range(2):  # the second is computed again, whatever is shared
        id = engine.submit(Request(prompt, greedy(2), prompt_logprobs=0))
        events = [event for event in iterate(engine) if event.request == id]
        told = events[0].prompt
        assert [token.id for token in told] == list(prompt)
        assert told[0].logprob is None
        assert all(event.prompt is None for event in events[1:])
        model = engine.runner.model
        tokens = decode(model, Request(prompt, greedy(2)), engine.config)[0]
        assert [event.token.id for event in events] == tokens
        assert told[1].logprob == pytest.approx(score(model, prompt, 1))
        assert told[-1].logprob == pytest.approx(score(model, prompt, len(prompt) - 1))
    id = engine.submit(Request(prompt, greedy(0), prompt_logprobs=0))
    (event,) = iterate(engine)
    assert event.token is None
    assert event.finish_reason == "length"
    assert len(event.prompt) == len(prompt)
    empty(engine)


def iterate(engine):
    while engine.has_work():
        yield from engine.step()


def score(model, prompt, place):
    """Log-probability of prompt[place] behind the tokens before it."""
    states = {i: model.embedding[token] for i, token in enumerate(prompt[:place])}
    for depth in range(model.loops * model.stored):
        k, v = map(
            np.stack, zip(*(model.keys(h, depth, i) for i, h in states.items()), strict=True)
        )
        states = {i: model.layer(h, depth, i, k[: i + 1], v[: i + 1]) for i, h in states.items()}
    z = model.head @ model.norm(states[place - 1])
    return z[prompt[place]] - np.log(np.exp(z).sum())


def test_a_cancelled_request_says_nothing_more():
    for after in range(12):
        engine = toy_engine(2, prefill_tokens=3, kv_pressure="offload", pages=6, requests=4)
        ids = [engine.submit(Request((1,) * 7, greedy(20))) for _ in range(4)]
        for _ in range(after):
            engine.step()
        engine.cancel(ids[0])
        engine.cancel(ids[0])
        engine.cancel(99)
        engine.scheduler.check()
        assert ids[0] not in {event.request for event in iterate(engine)}
        empty(engine)


def test_a_cancel_between_plan_and_report_waits_for_the_report():
    engine = toy_engine(2)
    ids = [engine.submit(Request((1, 2), greedy(9))) for _ in range(2)]
    inner = engine.runner.block

    def block(rows):
        engine.cancel(ids[0])
        return inner(rows)

    engine.runner.block = block
    found = drain(engine)
    assert set(found) == {ids[1]}
    assert len(found[ids[1]][0]) == 9
    empty(engine)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"width": 0}, "width: expected at least 1, got 0"),
        ({"fill_rows": -1}, "fill_rows: expected at least 0, got -1"),
        ({"mode": "fast"}, "mode: expected one of cdb, csb, lockstep, static, got 'fast'"),
        ({"kv_policy": "none"}, "kv_policy: expected one of exact_lazy, .*, got 'none'"),
        ({"order": "lifo"}, "order: expected one of fifo, deepest, uniform, got 'lifo'"),
        ({"kv_pressure": "x"}, "kv_pressure: expected one of none, reserve, .*, got 'x'"),
        ({"margin": 1.0}, r"margin: expected a share in \[0, 1\), got 1.0"),
        ({"min_free_requests": 9, "requests": 2}, "min_free_requests: expected at most the 2"),
        (
            {"kv_pressure": "recompute", "kv_policy": "copy"},
            "kv_pressure: expected none, reserve or offload with kv_policy copy",
        ),
        (
            {"kv_policy": "single", "prefill_tokens": 20},
            "prefill_tokens: expected a multiple of 16 with kv_policy single, got 20",
        ),
        ({"fill_on_finish": True}, "fill_on_finish: expected a prefix_cache and an exact"),
    ],
)
def test_what_a_configuration_refuses(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("request_", "depths", "sentence"),
    [
        (Request((1,) * 60, greedy(9)), None, "max_tokens: expected prompt and output of at most"),
        (
            Request((1,) * 60, greedy(4)),
            None,
            "max_tokens: expected prompt and output of at most 48",
        ),
        (Request((1,), greedy(4, max_loops=3)), None, "max_loops: expected at most 2 loops, got 3"),
        (Request((1,), greedy(4)), [1, 1], "exit_depths: expected one for each of 4 tokens, got 2"),
        (Request((1,), greedy(2)), [1, 3], "exit_depths: expected loops 1 to 2, got 3"),
        (Request((99,), greedy(2)), None, "prompt: expected tokens below the vocabulary of 29"),
    ],
)
def test_what_an_engine_refuses(request_, depths, sentence):
    engine = toy_engine(2, pages=3)
    with pytest.raises(ValueError, match=sentence):
        engine.submit(request_, depths)
    assert not engine.has_work()
    empty(engine)


def test_times_of_requests_and_tokens():
    now = [0.0]
    config = EngineConfig(width=2, max_model_len=64)
    engine = Engine(CountingRunner(ToyModel(2), config), config, clock=lambda: now[0])
    engine.submit(Request((1,), greedy(3)), exit_depths=[1] * 3)
    while engine.has_work():
        engine.step()
        now[0] += 1
    # a step for each loop of the prompt, one for the head; then two for each token
    assert list(engine.latencies.to_first) == [2.0]
    assert list(engine.latencies.between) == [2.0, 2.0]
    assert list(engine.latencies.per_token) == [2.0]
    told = engine.latencies.summary()
    assert told["ttft_p50"] == 2.0
    assert told["tpot_p99"] == 2.0
    engine.latencies.forget()
    assert np.isnan(engine.latencies.summary()["ttft_p50"])


def test_the_trace_has_a_line_for_every_step(tmp_path):
    file = (tmp_path / "trace.jsonl").open("w+")
    config = EngineConfig(width=2, max_model_len=64)
    engine = Engine(ToyRunner(ToyModel(2), config), config, trace=Trace(file))
    for i in range(3):
        engine.submit(Request((1, 2), greedy(6)), exit_depths=[1 + i % 2] * 6)
    drain(engine)
    file.close()
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    counted = engine.scheduler.counters()
    blocks = [line for line in lines if line["stage"] == "block"]
    assert len(blocks) == counted["blocks"]
    assert sum(line["rows"] for line in blocks) == counted["rows"]
    assert all(sum(line["loops"]) == line["rows"] for line in blocks)
    assert all(sum(line["kinds"].values()) == line["rows"] for line in blocks)
    assert sum(line["rows"] for line in lines if line["stage"] == "coda") == 18
    to_chrome(tmp_path / "trace.jsonl", tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(lines)
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"block", "coda"}
