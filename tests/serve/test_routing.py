"""Tokens that route themselves: what the host would have drawn, without a word to it."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routing_tools import HostAsked, Watched, engines, no_word_to_the_host
from serve_tiny import VOCABULARY, Double, tiny
from toy_models import collect, drain

from gemma_ext.nn.recursive import ExitHead
from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.policies import EXACT, POLICIES
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.router import MOST_STOPS
from gemma_ext.serve.sequential import Sequential

LOOPS = 3
MODEL = tiny("Llama", loops=LOOPS, layers=3, rank=4, dtype=torch.float32)
EXITS = ExitTest("max_prob", threshold=0.3)
ROUTED = [policy for policy in POLICIES if policy != "exact_eager"]
WAYS = (
    {"temperature": 0.0},
    {"temperature": 1.0, "logprobs": 3},
    {"temperature": 2.0, "top_p": 0.8, "logprobs": 20},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 1.0, "frequency_penalty": 1.0, "min_p": 0.01},
    {"temperature": 1.5, "top_k": 5, "min_tokens": 4, "stop_ids": tuple(range(0, 97, 5))},
)
THRESHOLDS = {
    "max_prob": 0.3, "margin": 0.2, "entropy": 2.0, "kl": 0.3, "argmax": 1, "cosine": 0.8,
    "latent_diff": 0.6, "gate": 0.5, "hazard": 0.7, "preloop": 0.6,
}  # fmt: skip


def tokens(count, seed=1):
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (count,), generator=random).tolist())


def requests(count=6, **options):
    return [
        Request(
            tokens(1 + 5 * i, i),
            SamplingParams(**{"max_tokens": 12 + i, "seed": i, **WAYS[i % len(WAYS)], **options}),
        )
        for i in range(count)
    ]


def serve(engine, asked, depths=None):
    """The events of each request."""
    ids = [engine.submit(request, depths) for request in asked]
    found = {id: [] for id in ids}
    while engine.has_work():
        for event in engine.step():
            found[event.request].append(event)
        engine.scheduler.check()
    return [[(event.token, event.finish_reason) for event in found[id]] for id in ids]


def assert_nothing_is_held(engine):
    assert engine.scheduler.free_pages == engine.config.pages
    assert engine.scheduler.free_slots == engine.config.prefill_tokens
    assert engine._requests == engine._depths == {}
    assert not any(engine.scheduler.queues().values())


def exit_test(name):
    weights = {"gate": (32,), "hazard": (32,), "preloop": (LOOPS, 32)}
    random = torch.Generator().manual_seed(3)
    weight = None
    if name in weights:
        weight = 0.3 * torch.randn(weights[name], generator=random)
    return ExitTest(name, THRESHOLDS[name], weight=weight)


@pytest.mark.parametrize("policy", ROUTED)
def test_tokens_depths_likelihoods_and_keys_are_those_of_the_host(policy):
    host, device = engines(MODEL, EXITS, kv_policy=policy, keep=2, backlog=4)
    seen = [Watched(engine) for engine in (host, device)]
    wanted, found = (serve(engine, requests()) for engine in (host, device))
    assert found == wanted  # floats too: the same bits
    depths = {token.exit_depth for events in wanted for token, _ in events[1:]}
    assert depths > {LOOPS}
    assert seen[1].ticks > 0
    if policy in EXACT:
        shared = 0
        for request, own in seen[0].keys.items():
            other = seen[1].keys[request]
            assert {place for place in own if place[0] == 0} <= other.keys()
            for place in own.keys() & other.keys():
                assert torch.equal(own[place], other[place]), place
                shared += place[0] > 0 and place[1] >= len(request.prompt)
        assert shared > 50
    assert_nothing_is_held(device)


@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize("loops", [2, 3])
def test_every_exit_test_decides_as_on_the_host(name, loops):
    model = MODEL if loops == 3 else tiny("Gemma2", loops=2, rank=3, dtype=torch.float32)
    test = exit_test(name)
    if name == "preloop" and loops == 2:
        test = ExitTest("preloop", 0.6, weight=test.weight[:2])
    host, device = engines(model, test, backlog=5)
    watched = Watched(device)
    asked = [
        *requests(4),
        Request((5, 6), SamplingParams(max_tokens=9, min_loops=2, temperature=0.0)),
        Request((7,), SamplingParams(max_tokens=9, max_loops=loops - 1, temperature=0.0)),
        Request((8,), SamplingParams(max_tokens=9, exit_threshold=-1e30, temperature=0.0)),
    ]
    assert serve(device, asked) == serve(host, asked)
    assert watched.ticks > 0


@pytest.mark.parametrize(("name", "loops"), [("Gemma2", 2), ("Qwen3", 3), ("Llama", 1)])
def test_in_float64_they_are_those_of_the_model_alone(name, loops):
    model = tiny(name, loops=loops, rank=3 * (loops > 1), layers=6 if loops == 3 else 4)
    test = ExitTest("max_prob", threshold=0.12)
    asked = requests(4)
    _, device = engines(model, test, pages=9, kv_pressure="recompute", margin=0.0)
    found = serve(device, asked)
    with Double():
        for request, events in zip(asked, found, strict=True):
            alone = Sequential(model, test).decode(request)
            assert [token.id for token, _ in events] == [token.id for token in alone]
            assert [t.exit_depth for t, _ in events] == [t.exit_depth for t in alone]
            for (token, _), own in zip(events, alone, strict=True):
                if own.logprob is not None:
                    assert token.logprob == pytest.approx(own.logprob, rel=1e-9)


def test_an_exit_head_of_its_own():
    model = tiny("Gemma2", loops=2, rank=3, dtype=torch.float32)
    model.exit_head = ExitHead(model.lm_head.weight, 2)
    torch.nn.init.normal_(model.exit_head.lora_B, std=0.5)
    host, device = engines(model, ExitTest("entropy", threshold=2.8))
    Watched(device)
    found = serve(device, requests())
    assert found == serve(host, requests())
    assert len({token.exit_depth for events in found for token, _ in events}) == 2


def test_replayed_exits_and_what_they_owe():
    """Rows of every tick are bounded, a backlog of one fills all the time."""
    for backlog, rows in ((1, 0), (3, 1), (64, None)):
        host, device = engines(
            MODEL, ExitTest(), backlog=backlog, fill_rows=rows, requests=3, width=2
        )
        depths = [3, 1, 1, 2, 1, 1, 1, 3, 1, 2, 2, 1, 1, 1, 1, 1, 3, 1]
        device.scheduler = heard = _Heard(device.scheduler)
        assert serve(device, requests(), depths) == serve(host, requests(), depths)
        assert max(total for total, *_ in heard.ran) <= 2 + (2 if rows is None else rows)
        assert sum(owed for _, _, owed, _ in heard.ran) > 0


class _Heard:
    """A scheduler that remembers what ran."""

    def __init__(self, scheduler):
        self._scheduler, self.ran = scheduler, []

    def report_drawn(self, drawn, ran):
        self.ran.append(ran)
        self._scheduler.report_drawn(drawn, ran)

    def __getattr__(self, name):
        return getattr(self._scheduler, name)


@pytest.mark.parametrize("pressure", ["recompute", "offload", "none"])
def test_preemption_while_a_tick_is_under_way(pressure):
    options = {"pages": 5, "margin": 0.0, "kv_pressure": pressure, "requests": 4}
    host, device = engines(MODEL, EXITS, **options, backlog=4)
    asked = requests(4, max_tokens=30)
    wanted = serve(host, asked)
    found = serve(device, asked)
    if pressure == "none":
        full = serve(engines(MODEL, EXITS)[0], asked)
        ended = [events[-1][1] for events in found]
        assert "error" in ended
        for events, whole in zip(found, full, strict=True):
            told = [event for event in events if event[0] is not None]
            assert whole[: len(told)] == told
    else:
        assert device.stats().preemptions > 0
        assert found == wanted
    assert_nothing_is_held(device)


def test_prefixes_are_shared_and_published():
    options = {"prefix_cache": True, "requests": 4, "max_model_len": 128}
    host, device = engines(MODEL, ExitTest(), **options)
    shared = tokens(40, 9)
    for engine in (host, device):
        for tail in ((1,), (2,), (3,)):
            request = Request((*shared, *tail), SamplingParams(max_tokens=20, temperature=0.0))
            engine.submit(request)
        drain(engine)
    assert device.scheduler.published_pages == host.scheduler.published_pages
    again = Request((*shared, 2), SamplingParams(max_tokens=30, temperature=0.0))
    assert serve(device, [again]) == serve(host, [again])
    counted = device.scheduler.counters()["cached_tokens"]
    assert counted == host.scheduler.counters()["cached_tokens"] > 0
    longer = Request((*shared, 2, *tokens(20, 4)), SamplingParams(max_tokens=8, temperature=0.0))
    assert serve(device, [longer]) == serve(host, [longer])


def test_stop_ids_that_only_the_host_knows():
    """The device draws on until the host says so; nobody hears of it."""
    many = tuple(range(1, VOCABULARY, 2))
    assert len(many) > MOST_STOPS
    asked = [
        Request((i,), SamplingParams(max_tokens=30, temperature=1.0, seed=i, stop_ids=many))
        for i in range(6)
    ]
    host, device = engines(MODEL, EXITS)
    found = serve(device, asked)
    assert found == serve(host, asked)
    assert {events[-1][1] for events in found} == {"stop"}
    assert device.scheduler.counters()["current_rows"] > host.scheduler.counters()["current_rows"]


def test_scored_prompts_and_prompts_without_output():
    asked = [
        Request(tokens(9), SamplingParams(max_tokens=n, temperature=0.0), prompt_logprobs=2)
        for n in (0, 3)
    ]
    asked.append(Request(tokens(20), SamplingParams(max_tokens=0)))
    events = []
    for engine in engines(MODEL, EXITS):
        ids = [engine.submit(request) for request in asked]
        told = {id: [] for id in ids}
        while engine.has_work():
            for event in engine.step():
                told[event.request].append((event.token, event.finish_reason, event.prompt))
        events.append([told[id] for id in ids])
    assert events[0] == events[1]


@st.composite
def workloads(draw):
    exact = draw(st.booleans())
    policy = draw(st.sampled_from([p for p in ROUTED if (p in EXACT) == exact]))
    pressure = draw(st.sampled_from(["reserve", "offload", "none", "recompute"]))
    if pressure == "recompute" and not exact:
        pressure = "offload"
    config = {
        "width": draw(st.integers(1, 4)),
        "requests": draw(st.integers(1, 5)),
        "pages": draw(st.integers(4, 9)),
        "kv_policy": policy,
        "keep": draw(st.integers(1, 2)),
        "backlog": draw(st.integers(1, 6)),
        "fill_rows": draw(st.integers(0, 3)),
        "prefill_tokens": draw(st.sampled_from([16, 32] if not exact else [3, 16, 32])),
        "kv_pressure": pressure,
        "margin": draw(st.sampled_from([0.0, 0.3])),
        "prefix_cache": draw(st.booleans()),
    }
    every = [
        {
            "tick": draw(st.integers(0, 30)),
            "cancel": draw(st.one_of(st.none(), st.integers(0, 40))),
            "request": Request(
                tokens(draw(st.integers(1, 30)), draw(st.integers(0, 2))),
                SamplingParams(
                    max_tokens=draw(st.integers(0, 20)),
                    seed=draw(st.integers(0, 3)),
                    min_loops=1,
                    max_loops=draw(st.sampled_from([None, 2, 3])),
                    exit_threshold=draw(st.sampled_from([None, 0.0, 0.2])),
                    **draw(st.sampled_from(WAYS)),
                ),
            ),
        }
        for _ in range(draw(st.integers(1, 6)))
    ]
    return config, every


ALONE = {}


def alone(request, config):
    """What the host decodes with nothing beside it."""
    kept = ("kv_policy", "keep", "prefill_tokens")
    key = (request, *(config[name] for name in kept))
    if key not in ALONE:
        given = {name: config[name] for name in kept}
        host = Engine.of_model(
            MODEL,
            EngineConfig(width=1, requests=1, max_model_len=64, routing="host", **given),
            exits=EXITS,
        )
        ALONE[key] = serve(host, [request])[0]
    return ALONE[key]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(workloads())
def test_any_workload(workload):
    given_, every = workload
    config = EngineConfig(max_model_len=64, routing="device", verify=True, **given_)
    engine = Engine.of_model(MODEL, config, exits=EXITS)
    watched = Watched(engine)
    waiting = sorted(range(len(every)), key=lambda i: every[i]["tick"])
    ids, told, cancelled, tick = {}, {}, set(), 0
    while waiting or engine.has_work():
        while waiting and every[waiting[0]]["tick"] <= tick:
            arrival = every[waiting.pop(0)]
            ids[engine.submit(arrival["request"])] = arrival
        for id, arrival in ids.items():
            due = arrival["cancel"] is not None and arrival["tick"] + arrival["cancel"] == tick
            if due and not (id in told and told[id] and told[id][-1][1]):
                cancelled.add(id)
                engine.cancel(id)
        for event in engine.step():
            assert event.request not in cancelled
            told.setdefault(event.request, []).append((event.token, event.finish_reason))
        engine.scheduler.check()
        tick += 1
        assert tick < 3000
    for id, arrival in ids.items():
        if id in cancelled:
            continue
        wanted = alone(arrival["request"], given_)
        if told[id][-1][1] == "error":
            assert config.kv_pressure == "none"
            drawn = [event for event in told[id] if event[0] is not None]
            assert drawn == wanted[: len(drawn)]
        else:
            assert told[id] == wanted
    assert_nothing_is_held(engine)
    assert not watched._rows


def test_the_host_waits_once_for_a_tick_and_that_for_the_one_before():
    _, device = engines(MODEL, EXITS)
    order = []
    tick, report = device.router.tick, device.scheduler.report_drawn

    def launched(*arguments):
        flight = tick(*arguments)
        order.append(("tick", device.router.ticks))
        land = flight.land
        number = device.router.ticks
        flight.land = lambda: (order.append(("land", number)), land())[1]
        return flight

    device.router.tick = launched
    device.submit(Request((1, 2, 3), SamplingParams(max_tokens=8, temperature=0.0)))
    drain(device)
    assert report is not None
    landed = [number for what, number in order if what == "land"]
    assert landed == list(range(1, len(landed) + 1))
    for number in landed[:-1]:
        assert order.index(("tick", number + 1)) < order.index(("land", number))


def test_the_guard_of_these_tests_refuses_a_wait():
    x = torch.arange(3)
    for ask in (
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: bool(x[0]),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: x.numpy(),
        lambda: int(x[1]),
    ):
        with pytest.raises(HostAsked), no_word_to_the_host():
            ask()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "csb"}, "routing: expected mode cdb with 'device', got another"),
        ({"order": "deepest"}, "routing: expected order fifo with"),
        ({"min_coda_batch": 2}, "routing: expected min_coda_batch 1 with"),
        ({"kv_policy": "exact_eager"}, "routing: expected another kv_policy than exact_eager"),
        ({"prefix_cache": True, "fill_on_finish": True}, "routing: expected fill_on_finish False"),
    ],
)
def test_what_a_device_does_not_route(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        EngineConfig(routing="device", **options)
    assert EngineConfig(**options).routed(True).routing == "host"


def test_models_that_a_device_does_not_route():
    model = tiny("Gemma2", loops=2, layers=6, order="middle-cycle", dtype=torch.float32)
    config = EngineConfig(max_model_len=64, routing="device")
    with pytest.raises(ValueError, match=r"^routing: expected a model whose layers are all in its"):
        Engine.of_model(model, config)
    with pytest.raises(ValueError, match=r"^routing: expected no shortlist with it"):
        Engine.of_model(MODEL, config, shortlist=True)
    with pytest.raises(ValueError, match=r"^routing: expected one of auto, host, device, got 'x'"):
        EngineConfig(routing="x")


def test_the_device_is_the_default_of_cards_alone():
    assert EngineConfig().routed(True).routing == "device"
    assert EngineConfig().routed(False).routing == "host"
    assert EngineConfig(routing="host").routed(True).routing == "host"
    assert Engine.of_model(MODEL, EngineConfig(max_model_len=64)).router is None


def test_counts_of_rows_and_exits():
    _, device = engines(MODEL, EXITS)
    asked = requests(4)
    found = {}
    ids = [device.submit(request) for request in asked]
    while device.has_work():
        collect(found, device.step())
    counted, stats = device.scheduler.counters(), device.stats()
    every = [depth for id in ids for depth in found[id][1]]
    assert [every.count(j + 1) for j in range(LOOPS)] == list(stats.exits)
    assert counted["outputs"] == len(every)
    assert counted["prompt_rows"] == LOOPS * sum(len(request.prompt) for request in asked)
    current = sum(sum(found[id][1][1:]) for id in ids)
    assert current <= counted["current_rows"] <= current + math.prod((2, LOOPS, len(asked)))
    assert stats.fill_rows == counted["fill_rows"] > 0
