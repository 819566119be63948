"""What a request may hold, and the sentence where it may not."""

import math

import pytest

from gemma_ext.serve.protocol import Limits, Request, SamplingParams

LIMITS = Limits(vocabulary=100, loops=2, max_model_len=32)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("max_tokens", -1, ValueError, "at least 0"),
        ("max_tokens", 1.0, TypeError, "an integer"),
        ("max_tokens", True, TypeError, "an integer"),
        ("max_tokens", None, TypeError, "an integer"),
        ("min_tokens", -1, ValueError, "at least 0"),
        ("temperature", -0.1, ValueError, "0.0 to 100.0"),
        ("temperature", math.nan, ValueError, "0.0 to 100.0"),
        ("temperature", math.inf, ValueError, "0.0 to 100.0"),
        ("temperature", "hot", TypeError, "a number"),
        ("top_k", -1, ValueError, "at least 0"),
        ("top_p", 0, ValueError, "more than 0"),
        ("top_p", 1.1, ValueError, "0.0 to 1.0"),
        ("min_p", 2, ValueError, "0.0 to 1.0"),
        ("repetition_penalty", 0.0, ValueError, "more than 0"),
        ("presence_penalty", 2.5, ValueError, "-2.0 to 2.0"),
        ("frequency_penalty", -3, ValueError, "-2.0 to 2.0"),
        ("seed", 2**63, ValueError, str(2**63 - 1)),
        ("seed", 1.5, TypeError, "an integer"),
        ("logprobs", 21, ValueError, "0 to 20"),
        ("logit_bias", {3: 101.0}, ValueError, "-100.0 to 100.0"),
        ("logit_bias", {-1: 1.0}, ValueError, "at least 0"),
        ("logit_bias", ((3, 1.0), (3, 2.0)), ValueError, "every token once"),
        ("tempered", 1, TypeError, "True or False"),
        ("stop_ids", (1.5,), TypeError, "an integer"),
        ("exit_threshold", math.nan, ValueError, "a number"),
        ("exit_threshold", "high", TypeError, "a number"),
        ("min_loops", 0, ValueError, "at least 1"),
        ("max_loops", 0, ValueError, "at least 1"),
    ],
)
def test_a_value_that_does_not_fit_is_named_first(name, value, error, words):
    with pytest.raises(error) as raised:
        SamplingParams(**{name: value})
    sentence = str(raised.value)
    assert sentence.startswith(f"{name}: expected ")
    assert words in sentence
    assert "\n" not in sentence


def test_bounds_are_legal():
    params = SamplingParams(
        max_tokens=0, temperature=0, top_p=1, min_p=1, logprobs=20, seed=-(2**63), min_loops=2,
        max_loops=2, presence_penalty=-2, frequency_penalty=2, exit_threshold=-1e9,
    )  # fmt: skip
    assert params.max_loops == 2
    assert SamplingParams().logprobs is None


def test_a_mapping_of_biases_becomes_pairs():
    assert SamplingParams(logit_bias={3: 1.0, 5: -100}).logit_bias == ((3, 1.0), (5, -100))


def test_fewer_loops_at_most_than_at_least():
    with pytest.raises(ValueError, match="max_loops: expected at least min_loops 3, got 2"):
        SamplingParams(min_loops=3, max_loops=2)


@pytest.mark.parametrize(
    ("keywords", "error", "sentence"),
    [
        ({"prompt": ()}, ValueError, "prompt: expected at least one token, got none"),
        ({"prompt": (1, -2)}, TypeError, "prompt: expected token ids, integers of at least 0"),
        ({"prompt": (1, 2.0)}, TypeError, "prompt: expected token ids, integers of at least 0"),
        ({"prompt": (1,), "choice": -1}, ValueError, "choice: expected an integer of at least 0"),
        ({"prompt": (1,), "prompt_logprobs": 21}, ValueError, "prompt_logprobs: expected an int"),
    ],
)
def test_requests_are_checked_when_made(keywords, error, sentence):
    with pytest.raises(error) as raised:
        Request(**keywords)
    assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request((100,)), "prompt: expected tokens below the vocabulary of 100, got 100"),
        (
            Request((1,), SamplingParams(stop_ids=(7, 300))),
            "stop_ids: expected tokens below the vocabulary of 100, got 300",
        ),
        (
            Request((1,), SamplingParams(logit_bias={100: 1.0})),
            "logit_bias: expected tokens below the vocabulary of 100, got 100",
        ),
        (
            Request((1,) * 20, SamplingParams(max_tokens=13)),
            "max_tokens: expected prompt and output of at most 32 tokens, got 20 + 13",
        ),
        (
            Request((1,), SamplingParams(max_loops=3)),
            "max_loops: expected at most 2 loops, got 3",
        ),
        (
            Request((1,), SamplingParams(min_loops=3)),
            "min_loops: expected at most 2 loops, got 3",
        ),
    ],
)
def test_what_no_engine_of_these_limits_can_answer(request_, sentence):
    with pytest.raises(ValueError) as raised:
        request_.check(LIMITS)
    assert str(raised.value) == sentence


def test_a_request_that_just_fits():
    Request(range(20), SamplingParams(max_tokens=12, max_loops=2, stop_ids=(99,))).check(LIMITS)
