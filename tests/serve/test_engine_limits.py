"""One request among others: its extremes, its failure, its neighbours."""

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_tiny import Double, tiny

from gemma_ext.nn.recursive import ExitHead
from gemma_ext.serve import sampling
from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.protocol import MOST_COUNT, MOST_IDS, Request, SamplingParams
from gemma_ext.serve.readout import Head, Readout
from gemma_ext.serve.sampling import CANDIDATES, Sampler, kept
from gemma_ext.serve.weights import read_weights

MODEL = tiny("Gemma2", loops=2, rank=3, dtype=torch.float32)
OTHER = Request((4, 2, 3), SamplingParams(max_tokens=5, temperature=2.0, seed=3))


def engine_of(model=MODEL, **options) -> Engine:
    config = EngineConfig(**{"width": 4, "max_model_len": 32, "verify": True, **options})
    return Engine.of_model(model, config, exits=ExitTest("max_prob", 0.5))


def serve(engine, *asked):
    """The events of each request."""
    ids = [engine.submit(request) for request in asked]
    found = {id: [] for id in ids}
    while engine.has_work():
        for event in engine.step():
            found[event.request].append(event)
    engine.scheduler.check()
    return [found[id] for id in ids]


def tokens(events):
    return [event.token.id for event in events if event.token is not None]


ALONE = tokens(serve(engine_of(), OTHER)[0])
HUGE = st.sampled_from([0, 1, 3, 2**31 - 1, 2**31, 2**63, 10**30, 10**400, -1])
EXTREME = st.sampled_from(
    [0.0, 5e-324, 1e-40, 1e-30, 1e-7, 1e-6, 0.3, 1.0, 2.0, 100.0, 1e29, 1e300, 10**400, math.inf]
)
ANYTHING = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("min_tokens", "top_k", "logprobs", "min_loops", "max_loops"), HUGE),
        **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), EXTREME),
        **dict.fromkeys(("presence_penalty", "frequency_penalty", "exit_threshold"), EXTREME),
        "seed": st.sampled_from([0, -(2**63), 2**63 - 1, 2**63]),
        "stop_ids": st.sampled_from([(), (1,), tuple(range(97)), (2**40,)]),
        "logit_bias": st.sampled_from([(), {0: -100.0, 96: 100.0}, {2**70: 1.0}]),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(ANYTHING, st.sampled_from([0, 2**31 - 1, 2**31, 10**30]))
def test_no_request_ends_the_engine(own, choice):
    engine, legal = engine_of(), {}
    for name, value in own.items():
        with contextlib.suppress(TypeError, ValueError):
            Request((1,), SamplingParams(max_tokens=5, **{name: value})).check(engine.limits)
            legal[name] = value
    try:
        request = Request((1, 2, 3), SamplingParams(max_tokens=5, **legal), choice)
    except ValueError:  # the choice, or fewer loops at most than at least
        return
    mine, others = serve(engine, request, OTHER)
    assert mine[-1].finish_reason in ("stop", "length")
    assert tokens(others) == ALONE


@pytest.mark.parametrize("name", ["max_tokens", "min_tokens", "top_k", "min_loops", "max_loops"])
def test_counts_fit_32_bits(name):
    assert getattr(SamplingParams(**{name: MOST_COUNT}), name) == MOST_COUNT
    with pytest.raises(ValueError, match=f"{name}: expected an integer of . to {MOST_COUNT}, got"):
        SamplingParams(**{name: MOST_COUNT + 1})


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e31, 10**400])
def test_thresholds_are_finite(value):
    with pytest.raises(ValueError, match=r"exit_threshold: expected a number of -1e\+30 to 1e\+30"):
        SamplingParams(exit_threshold=value)


@pytest.mark.parametrize("name", ["logit_bias", "stop_ids"])
def test_lists_of_tokens_are_bounded(name):
    def given(count):
        return {name: dict.fromkeys(range(count), 1.0) if name == "logit_bias" else range(count)}

    SamplingParams(**given(MOST_IDS))
    with pytest.raises(ValueError, match=f"{name}: expected at most 1024 tokens, got 1025"):
        SamplingParams(**given(MOST_IDS + 1))


def test_a_temperature_without_an_inverse_is_greedy():
    greedy = tokens(serve(engine_of(), Request((1, 2, 3), SamplingParams(temperature=0)))[0])
    for heat in (9e-7, 1e-30, 1e-40):
        for own in ({}, {"top_p": 0.9}, {"presence_penalty": 0.0, "logit_bias": {3: 0.0}}):
            params = SamplingParams(temperature=heat, **own)
            assert params.temperature == 0
            assert tokens(serve(engine_of(), Request((1, 2, 3), params))[0]) == greedy
    assert SamplingParams(temperature=1e-6).temperature == 1e-6


def test_a_request_that_cannot_begin_ends_alone(monkeypatch):
    engine = engine_of(prefix_cache=True)
    begin = engine.runner.open

    def fails(row, request, drawn=()):
        if request.params.seed == 13:
            raise OverflowError("too large")
        begin(row, request, drawn)

    monkeypatch.setattr(engine.runner, "open", fails)
    bad = Request((1,) * 20, SamplingParams(max_tokens=5, seed=13), prompt_logprobs=1)
    first, others, last = serve(engine, bad, OTHER, bad)
    for events in (first, last):
        (event,) = events
        assert event.finish_reason == "error"
        assert event.error == "the request could not begin: OverflowError: too large"
        assert event.token is None
    assert tokens(others) == ALONE
    assert engine.scheduler.free_slots == engine.config.slots
    assert engine.scheduler.free_pages == engine.config.pages
    assert len(engine.open) == 0


def test_the_pool_bounds_the_length():
    engine = engine_of(pages=1)
    assert engine.limits.max_model_len == 16
    with pytest.raises(ValueError, match="max_tokens: expected prompt and output of at most 16"):
        engine.submit(Request((1,) * 10, SamplingParams(max_tokens=7)))
    assert engine_of(pages=9).limits.max_model_len == 32


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_a_logprob_does_not_know_its_neighbours(asked):
    """To the last bit: a neighbour that asks for more brings candidates, which are read apart."""
    count = 64
    weights = read_weights(tiny("Gemma2", vocab_size=203, hidden_size=256), dtype=torch.float32)
    bank = torch.randn(count, 256, generator=torch.Generator().manual_seed(0))
    late = torch.zeros(count, dtype=torch.bool)
    every = torch.arange(count)

    def logprobs(neighbour):
        s = Sampler(Readout(Head(weights), bank, count, CANDIDATES), count, 16)
        for row in range(count):
            wants = neighbour if row == 0 else asked
            params = SamplingParams(temperature=9.0, seed=row, logprobs=wants)
            s.open(row, Request((1,), params))
        return s.draw(every, every, torch.zeros(count, dtype=torch.int64), late).logprobs[1:]

    assert torch.equal(logprobs(asked), logprobs(20))


def sampler(rows):
    bank = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))
    weights = read_weights(tiny("Gemma2", vocab_size=203), dtype=torch.float32)
    return Sampler(Readout(Head(weights), bank, rows, CANDIDATES), rows, 16)


def test_a_row_keeps_the_sample_of_the_head_whatever_its_neighbours_keep():
    s, every = sampler(3), torch.arange(3)
    for row in range(3):
        s.open(row, Request((1,), SamplingParams(top_k=5, seed=row)))
    positions = torch.zeros(3, dtype=torch.int64)
    read = s.readout.read(every, every, positions, torch.zeros(3, dtype=torch.bool))
    own, _ = s.among_candidates(read, every, positions, every)
    # the sums of the head and of the candidates may round to either of two near tokens
    near = next(i for i in read.indices[0, :5].tolist() if i != int(own[0]))
    outside = int(read.indices[1, 40])
    samples = torch.tensor([near, outside, int(own[2])], dtype=torch.int32)
    found, _ = s.among_candidates(read._replace(samples=samples), every, positions, every)
    assert found.tolist() == [near, int(own[1]), int(own[2])]


def test_only_rows_that_cut_are_cut(monkeypatch):
    s, every, seen = sampler(4), torch.arange(4), []

    def spied(values, *given, whole):
        seen.append(len(values))
        return kept(values, *given, whole=whole)

    monkeypatch.setattr(sampling, "kept", spied)
    for row in range(4):
        params = SamplingParams(seed=row, presence_penalty=1.0, top_p=0.5 if row == 2 else 1.0)
        s.open(row, Request((1,), params))
    s.draw(every, every, torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool))
    assert seen == [1]


def test_rounding_cuts_nothing_that_was_not_asked_to_be_cut():
    values = (
        torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).sort(-1).values.flip(-1)
    )
    one, none = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    keep, _ = kept(values, values.logsumexp(-1), none, one, torch.zeros(3), whole=True)
    assert keep.all()
    keep, _ = kept(values, values.logsumexp(-1), none, 0 * one, torch.zeros(3), whole=True)
    assert torch.equal(keep.sum(-1), torch.ones(3, dtype=torch.int64))  # 0 in float32


def test_prompts_are_scored_with_the_head_of_their_last_loop():
    model = tiny("Gemma2", loops=2, rank=3)
    model.exit_head = ExitHead(model.lm_head.weight, rank=4)
    with torch.no_grad():
        model.exit_head.lora_B.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    for loops in (1, 2):
        params = SamplingParams(
            max_tokens=6, temperature=0.0, logprobs=2, min_loops=loops, max_loops=loops
        )
        with Double():
            (events,) = serve(engine_of(model), Request((5, 6, 7), params))
            drawn = [event.token for event in events]
            prompt = (5, 6, 7, *(token.id for token in drawn))
            asked = SamplingParams(max_tokens=0, max_loops=loops)
            ((event,),) = serve(engine_of(model), Request(prompt, asked, prompt_logprobs=2))
        for token, scored in zip(drawn, event.prompt[3:], strict=True):
            assert scored.logprob == pytest.approx(token.logprob, rel=1e-9)
            assert [id for id, _ in scored.top] == [id for id, _ in token.top]


def test_a_server_keeps_the_latest_times(monkeypatch):
    from gemma_ext.serve import stats

    monkeypatch.setattr(stats, "LATEST", 50)
    engine = engine_of()
    serve(engine, *[Request((1,), SamplingParams(max_tokens=20)) for _ in range(6)])
    kinds = ("to_first", "between", "per_token")
    assert [len(getattr(engine.latencies, name)) for name in kinds] == [6, 50, 6]
    assert np.isfinite(list(engine.latencies.summary().values())).all()
