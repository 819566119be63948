"""The reference of sampling: order of the adjustments, known answers, frequencies."""

import numpy as np
import pytest

from gemma_ext.serve.protocol import Limits, Request, SamplingParams
from gemma_ext.serve.scripted import ScriptedEngine, adjust, draw, keep_likeliest

LIMITS = Limits(vocabulary=8, loops=3, max_model_len=64)
LOGITS = np.array([3.0, -1.0, 2.0, 0.5, 3.0, -2.0, 1.0, 0.0])


def run(engine, *requests):
    ids = [engine.submit(request) for request in requests]
    events = []
    while engine.has_work():
        events += engine.step()
    return [[event for event in events if event.request == id] for id in ids]


def test_bias_then_penalties():
    params = SamplingParams(
        logit_bias={1: 2.0},
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    values = adjust(LOGITS, (1, 5), (2, 2, 6), params)
    # 1: (-1 + 2) / 2; 5: -2 * 2; 2: 2 / 2 - 0.5 - 2 * 0.25; 6: 1 / 2 - 0.5 - 0.25
    assert values.tolist() == [3.0, 0.5, 0.0, 0.5, 3.0, -4.0, -0.25, 0.0]
    assert LOGITS[1] == -1.0


def test_stop_ids_wait_for_the_least_length():
    params = SamplingParams(min_tokens=2, stop_ids=(0, 4))
    assert adjust(LOGITS, (1,), (1,), params)[[0, 4]].tolist() == [-np.inf, -np.inf]
    assert adjust(LOGITS, (1,), (1, 1), params)[[0, 4]].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 2, 4}),
        ({"top_p": 1e-6}, {0}),
        ({"min_p": 1.0}, {0, 4}),
        ({"min_p": 0.3}, {0, 2, 4}),
        ({}, set(range(8))),
    ],
)
def test_the_likeliest_are_kept(options, kept):
    values = keep_likeliest(LOGITS, SamplingParams(**options))
    assert set(np.flatnonzero(np.isfinite(values))) == kept


def test_top_p_keeps_the_fewest_that_reach_it():
    shares = np.array([0.5, 0.25, 0.125, 0.125])
    for top_p, count in ((0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (1.0, 4)):
        values = keep_likeliest(np.log(shares), SamplingParams(top_p=top_p))
        assert np.isfinite(values).sum() == count


def test_draws_have_the_shares_of_the_softmax():
    shares = np.exp(LOGITS / 1.5) / np.exp(LOGITS / 1.5).sum()
    requests = [Request((1,), SamplingParams(temperature=1.5, seed=seed)) for seed in range(4000)]
    counts = np.bincount([draw(LOGITS, (), request) for request in requests], minlength=8)
    assert np.abs(counts / 4000 - shares).max() < 4 * np.sqrt(0.25 / 4000)


def test_a_draw_is_a_function_of_seed_choice_and_position():
    params = SamplingParams(max_tokens=20, seed=-3)
    same, other = Request((1, 2), params), Request((1, 2), params, choice=1)
    told = run(ScriptedEngine(LIMITS), same, other, Request((3,), params), same)
    tokens = [[event.token.id for event in events] for events in told]
    assert tokens[0] == tokens[3] != tokens[1]
    alone = run(ScriptedEngine(LIMITS, running=1), other, same)
    assert [event.token.id for event in alone[0]] == tokens[1]


def test_greedy_takes_the_lowest_of_equal_ones():
    assert draw(LOGITS, (), Request((1,), SamplingParams(temperature=0))) == 0


def test_scores_and_ends():
    logits = lambda ids: LOGITS + np.eye(8)[ids[-1]]  # noqa: E731
    engine = ScriptedEngine(LIMITS, logits, depth=lambda ids: 2)
    params = SamplingParams(max_tokens=5, temperature=0, logprobs=2, stop_ids=(0,))
    request = Request((1, 5, 0), params, prompt_logprobs=1)
    (scored,), (bare,) = run(
        engine, request, Request((1, 2), SamplingParams(max_tokens=0), prompt_logprobs=0)
    )
    assert (bare.token, bare.finish_reason, len(bare.prompt)) == (None, "length", 2)
    assert bare.prompt[1].top == ()
    assert (scored.token.id, scored.finish_reason, scored.token.exit_depth) == (0, "stop", 2)
    first = logits([1])
    expected = first[5] - np.log(np.exp(first).sum())
    assert scored.prompt[0].logprob is None
    assert scored.prompt[1].logprob == pytest.approx(expected)
    assert [id for id, _ in scored.token.top] == [0, 4]
    assert engine.stats().exits == (0, 1, 0)


@pytest.mark.parametrize(("bounds", "depth"), [((1, None), 2), ((3, None), 3), ((1, 1), 1)])
def test_loops_are_bounded(bounds, depth):
    params = SamplingParams(max_tokens=1, min_loops=bounds[0], max_loops=bounds[1])
    ((event,),) = run(ScriptedEngine(LIMITS, depth=lambda ids: 2), Request((1,), params))
    assert event.token.exit_depth == depth


def test_requests_wait_for_pages():
    engine = ScriptedEngine(LIMITS, pages=4)
    for _ in range(3):
        engine.submit(Request((1,) * 16, SamplingParams(max_tokens=16)))
    engine.step()
    assert (engine.stats().running, engine.stats().waiting, engine.stats().free_pages) == (2, 1, 0)
    with pytest.raises(ValueError, match=r"output of at most 64 tokens, got 50 \+ 15"):
        ScriptedEngine(Limits(8, 1, 200), pages=4).submit(
            Request((1,) * 50, SamplingParams(max_tokens=15))
        )
