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
from gemma_ext.serve.config import MODES, ORDERS, EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.policies import EXACT, POLICIES
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.route import FREE, READY, Route, Shape
from gemma_ext.serve.router import DEVICE_STOPS
from gemma_ext.serve.sequential import Sequential

LOOPS = 3
MODEL = tiny("Llama", loops=LOOPS, layers=3, rank=4, dtype=torch.float32)
EXITS = ExitTest("max_prob", threshold=0.3)
LAYERED = tiny(
    "Gemma2", loops=2, layers=6, rank=4, order="middle-cycle", dtype=torch.float32
)  # a layer in front of its loops and one behind them
MODELS = {
    "Llama": (MODEL, EXITS, POLICIES),
    "layered": (LAYERED, ExitTest("max_prob", threshold=0.12), (*EXACT, "propagate")),
}
WAYS = (
    {"temperature": 0.0},
    {"temperature": 1.0, "logprobs": 3},
    {"temperature": 2.0, "top_p": 0.8, "logprobs": 20},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 1.0, "frequency_penalty": 1.0, "min_p": 0.01},
    {"temperature": 1.5, "top_k": 5, "min_tokens": 4, "stop_ids": tuple(range(0, 97, 5))},
    {"temperature": 1.3, "logprobs": 2, "tempered": True},
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
    assert len(engine.open) == 0
    assert not any(engine.scheduler.queues().values())


def exit_test(name):
    weights = {"gate": (32,), "hazard": (32,), "preloop": (LOOPS, 32)}
    random = torch.Generator().manual_seed(3)
    weight = None
    if name in weights:
        weight = 0.3 * torch.randn(weights[name], generator=random)
    return ExitTest(name, THRESHOLDS[name], weight=weight)


@pytest.mark.parametrize(
    ("name", "policy"), [(name, policy) for name in MODELS for policy in MODELS[name][2]]
)
def test_tokens_depths_likelihoods_and_keys_are_those_of_the_host(name, policy):
    model, exits, _ = MODELS[name]
    host, device = engines(model, exits, kv_policy=policy, keep=2, backlog=4)
    seen = [Watched(engine) for engine in (host, device)]
    wanted, found = (serve(engine, requests(7)) for engine in (host, device))
    assert found == wanted  # floats too: the same bits
    depths = {token.exit_depth for events in wanted for token, _ in events[1:]}
    assert depths > {device.runner.loops}
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


@pytest.mark.parametrize(
    ("name", "loops", "order"),
    [
        ("Gemma2", 2, "cycle"),
        ("Qwen3", 3, "cycle"),
        ("Llama", 1, "cycle"),
        ("Gemma2", 2, "middle-cycle"),
    ],
)
def test_in_float64_they_are_those_of_the_model_alone(name, loops, order):
    layers = 6 if loops == 3 or order != "cycle" else 4
    model = tiny(name, loops=loops, rank=3 * (loops > 1), layers=layers, order=order)
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
        assert max(total for total, *_ in heard.ran) <= 2 + (2 + 16 if rows is None else rows)
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


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    """Tokens of a pass stand at one loop; the width is less than what waits."""
    options = {"mode": mode, "kv_policy": "copy", "width": 3, "requests": 7}
    host, device = engines(MODEL, EXITS, **options)
    device.scheduler = heard = _Heard(device.scheduler)
    found = serve(device, requests(9))
    assert found == serve(host, requests(9))
    depths = {token.exit_depth for events in found for token, _ in events}
    assert (depths == {LOOPS}) == (mode in ("csb", "static"))
    assert max(current for _, current, *_ in heard.ran) == 3
    assert (max(loops for *_, loops in heard.ran) == 1) == (mode != "cdb")


@pytest.mark.parametrize("order", ORDERS)
def test_orders(order):
    host, device = engines(MODEL, EXITS, order=order, width=2, requests=7)
    assert serve(device, requests(7)) == serve(host, requests(7))


def test_which_tokens_run_first():
    """Of requests that became ready in turn, at loops 0 1 1 0 1 2."""
    for order, taken in (("fifo", {0, 1}), ("deepest", {5, 1}), ("uniform", {0, 3})):
        shape = Shape(6, 2, 16, 3, 8, 9, 0, 0, order=order)
        route = Route(shape, "single", "auto", torch.device("cpu"))
        route.kind[:6], route.last[:6], route.limit[:6] = READY, 3, 9
        route.loop[:6] = torch.tensor([0, 1, 1, 0, 1, 2])
        route.since[:6] = torch.arange(6)
        assert set(route.units(16).take.nonzero().squeeze(1).tolist()) == taken
    route.kind[3] = FREE  # fewer than the width at loop 0: the oldest, whatever they are
    assert set(route.units(16).take.nonzero().squeeze(1).tolist()) == {0, 1}


def test_more_loops_than_rows():
    model = tiny("Llama", loops=6, layers=6, rank=2, dtype=torch.float32)
    exits = ExitTest("max_prob", threshold=0.2)
    options = {"width": 1, "requests": 1, "fill_rows": 0, "backlog": 2}
    host, device = engines(model, exits, **options)
    asked = [*requests(3), *requests(3, max_loops=3)]
    assert serve(device, asked) == serve(host, asked)


def test_eager_fills_run_earlier_and_no_more_often():
    options = {"backlog": 8, "width": 6, "requests": 6, "fill_rows": 2}
    asked = requests(4, max_tokens=30, stop_ids=(), min_tokens=0)
    depths = [3, *[1] * 12, 3, *[1] * 17]
    owed = {}
    for policy in EXACT:
        _, device = engines(MODEL, ExitTest(), kv_policy=policy, **options)
        device.scheduler = heard = _Heard(device.scheduler)
        owed[policy] = serve(device, asked, depths), heard.ran
    assert owed["exact_eager"][0] == owed["exact_lazy"][0]
    fills = {policy: [fills for *_, fills, _ in ran] for policy, (_, ran) in owed.items()}
    assert sum(fills["exact_eager"]) > sum(fills["exact_lazy"])  # of the ends too
    first = {policy: next(i for i, n in enumerate(fills[policy]) if n) for policy in EXACT}
    assert first["exact_eager"] < first["exact_lazy"]


@pytest.mark.parametrize("policy", EXACT)
def test_outputs_are_filled_and_shared(policy):
    options = {
        "kv_policy": policy, "prefix_cache": True, "fill_on_finish": True, "requests": 3,
        "max_model_len": 128, "pages": 40, "backlog": 5,
    }  # fmt: skip
    engines_ = engines(MODEL, EXITS, **options)
    asked = [
        Request(tokens(20, i), SamplingParams(max_tokens=30, temperature=float(i > 0), seed=i))
        for i in range(4)
    ]
    told = [serve(engine, asked) for engine in engines_]
    assert told[0] == told[1]
    assert {token.exit_depth for events in told[0] for token, _ in events} > {LOOPS}
    again = []
    for request, events in zip(asked, told[0], strict=True):
        said = tuple(token.id for token, _ in events)
        params = SamplingParams(max_tokens=4, temperature=0.0)
        again.append(Request((*request.prompt, *said, 1), params))
    answers = [serve(engine, again) for engine in engines_]
    assert answers[0] == answers[1] == serve(engines(MODEL, EXITS, max_model_len=128)[0], again)
    cached = [engine.scheduler.counters()["cached_tokens"] for engine in engines_]
    assert cached[0] == cached[1] == 4 * 48  # whole pages of 49 positions
    assert_nothing_is_held(engines_[1])


def test_fills_at_the_end_give_way():
    """Requests that need their pages, and outputs whose end the device does not know."""
    options = {
        "prefix_cache": True, "fill_on_finish": True, "requests": 4, "width": 2, "pages": 7,
        "fill_rows": 0, "kv_pressure": "recompute", "margin": 0.0, "backlog": 12,
    }  # fmt: skip
    host, device = engines(MODEL, ExitTest("max_prob", threshold=0.0), **options)
    many = tuple(range(0, VOCABULARY, 3))
    asked = [
        *requests(4, max_tokens=40, stop_ids=(), min_tokens=0),
        *requests(4, temperature=1.0, stop_ids=many, min_tokens=0),
    ]
    assert serve(device, asked) == serve(host, asked)
    assert device.scheduler.counters()["dropped_fills"] > 0
    assert_nothing_is_held(device)


def test_stop_ids_that_only_the_host_knows():
    """The device draws on until the host says so; nobody hears of it."""
    many = tuple(range(1, VOCABULARY, 2))
    assert len(many) > DEVICE_STOPS
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
    name = draw(st.sampled_from(sorted(MODELS)))
    exact = draw(st.booleans())
    policy = draw(st.sampled_from([p for p in MODELS[name][2] if (p in EXACT) == exact]))
    prefix_cache = draw(st.booleans())
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
        "prefix_cache": prefix_cache,
        "fill_on_finish": prefix_cache and exact and draw(st.booleans()),
        "mode": draw(st.sampled_from(["cdb", *MODES])),
        "order": draw(st.sampled_from(["fifo", *ORDERS])),
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
                    max_loops=draw(st.sampled_from([None, 1, 2])),
                    exit_threshold=draw(st.sampled_from([None, 0.0, 0.2])),
                    **draw(st.sampled_from(WAYS)),
                ),
            ),
        }
        for _ in range(draw(st.integers(1, 6)))
    ]
    return name, config, every


ALONE = {}


def alone(name, request, config):
    """What the host decodes with nothing beside it."""
    given = {"keep": config["keep"], "prefill_tokens": config["prefill_tokens"]}
    given["kv_policy"] = config["kv_policy"].replace("eager", "lazy")
    given["mode"] = "csb" if config["mode"] in ("csb", "static") else "cdb"
    key = (name, request, *given.values())
    if key not in ALONE:
        model, exits, _ = MODELS[name]
        host = Engine.of_model(
            model,
            EngineConfig(width=1, requests=1, max_model_len=64, routing="host", **given),
            exits=exits,
        )
        ALONE[key] = serve(host, [request])[0]
    return ALONE[key]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(workloads())
def test_any_workload(workload):
    name, given_, every = workload
    model, exits, _ = MODELS[name]
    config = EngineConfig(max_model_len=64, routing="device", verify=True, **given_)
    engine = Engine.of_model(model, config, exits=exits)
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
        wanted = alone(name, arrival["request"], given_)
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
        ({"min_coda_batch": 2}, "routing: expected min_coda_batch 1 with 'device', got another"),
        ({"drafts": 1}, "routing: expected drafts 0 with 'device', got another"),
    ],
)
def test_what_a_device_does_not_route(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        EngineConfig(routing="device", **options)
    assert EngineConfig(**options).routed(True).routing == "host"


@pytest.mark.parametrize("name", ["none", "latent_diff", "max_prob"])
def test_codes_of_the_head(name):
    """They are read where all draws are greedy and no test asks the head."""
    test = ExitTest() if name == "none" else exit_test(name)
    host, device = engines(MODEL, test, shortlist=True)
    asked_of, run = [], device.router.work.run

    def watched(rows, reading):
        asked_of.append(reading)
        run(rows, reading)

    device.router.work.run = watched
    for greedy in (True, False):
        asked = requests(
            5, logprobs=None, top_k=0, top_p=1.0, min_p=0.0, temperature=float(not greedy)
        )
        assert serve(device, asked) == serve(host, asked)
        assert set(asked_of) == {"best" if greedy and name != "max_prob" else "samples"}
        asked_of.clear()
    assert serve(device, requests()) == serve(host, requests())
    assert "candidates" in asked_of


def test_no_other_routing():
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
