"""What the records compute, what is refused, and a model that follows a script."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_ext.lm import (
    Choice,
    Completion,
    LanguageModel,
    Perplexity,
    Sampling,
    Score,
    ScriptedModel,
)

SAY = ScriptedModel({"hi": "hello there\nyou"}, {("a", " b"): [-1.0, -2.0], ("", "a b"): -6.0})


def choice(*logprobs: float, options=("a", "bcd", "é")) -> Choice:
    return Choice(options, tuple(Score((p / 2, p / 2), None) for p in logprobs))


def test_values_are_divided_by_length():
    found = choice(-3.0, -6.0, -4.0)
    assert found.values() == (-3.0, -6.0, -4.0)
    assert found.values("tokens") == (-1.5, -3.0, -2.0)
    assert found.values("characters") == (-3.0, -2.0, -4.0)
    assert found.values("bytes") == (-3.0, -2.0, -2.0)
    assert [found.best(unit) for unit in (None, "tokens", "characters", "bytes")] == [0, 0, 1, 1]


def test_probabilities_are_a_softmax():
    found = choice(-1.0, -2.0, -math.inf).probabilities()
    assert found == pytest.approx((1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0.0), abs=1e-15)
    assert sum(choice(-2000.0, -2001.0, -2002.0).probabilities()) == pytest.approx(1.0)


def test_lengths_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"expected normalise to be one of .*, got 'words'"):
        choice(-1.0, -1.0, -1.0).values("words")
    empty = choice(-1.0, -1.0, options=("a", ""))
    with pytest.raises(ValueError, match="expected options with bytes to normalise by, got ''"):
        empty.values("bytes")


def test_perplexities_add_up():
    whole = Perplexity(-8.0, 4, 2, 16) + Perplexity(-4.0, 2, 2, 8)
    assert whole == Perplexity(-12.0, 6, 4, 24)
    assert whole.per_token == pytest.approx(math.exp(2))
    assert whole.per_word == pytest.approx(math.exp(3))
    assert whole.per_byte == pytest.approx(math.exp(0.5))
    assert whole.bits_per_byte == pytest.approx(0.5 / math.log(2))
    assert math.isnan(Perplexity(0.0, 0, 0, 0).per_token)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"max_tokens": 0}, ValueError, "expected max_tokens to be at least 1, got 0"),
        ({"max_tokens": 1.5}, TypeError, "expected max_tokens to be an int, got 1.5"),
        ({"max_tokens": True}, TypeError, "expected max_tokens to be an int, got True"),
        ({"temperature": -1.0}, ValueError, "expected temperature to be 0 or more, got -1.0"),
        ({"temperature": math.inf}, ValueError, "expected temperature to be 0 or more, got inf"),
        ({"temperature": "1"}, TypeError, "expected temperature to be a number, got '1'"),
        ({"top_k": -1}, ValueError, "expected top_k to be at least 0, got -1"),
        ({"top_p": 0.0}, ValueError, r"expected top_p in \(0, 1\], got 0.0"),
        ({"seed": -1}, ValueError, "expected seed to be at least 0, got -1"),
        ({"stop": "\n"}, TypeError, "expected stop to be a sequence of strings, got"),
        ({"stop": [""]}, ValueError, "expected stop to hold strings that are not empty, got"),
        ({"stop": [3]}, ValueError, "expected stop to hold strings that are not empty, got"),
    ],
)
def test_sampling_is_checked(options, error, sentence):
    with pytest.raises(error, match=sentence):
        Sampling(**options)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: SAY.generate("hi"), TypeError, "prompts to be a sequence of them, got str"),
        (lambda: SAY.generate([3]), TypeError, r"prompts\[0\] to be a string or a list of mess"),
        (lambda: SAY.generate([[{"role": "user"}]]), TypeError, r"prompts\[0\] to be a string"),
        (lambda: SAY.generate([[]]), TypeError, r"prompts\[0\] to be a string"),
        (lambda: SAY.generate(["hi"], {}), TypeError, "sampling to be a Sampling, got dict"),
        (lambda: SAY.logprobs(["a"], []), ValueError, "continuation for each of 1 prompts, got 0"),
        (lambda: SAY.logprobs(["a"], [1]), TypeError, r"continuations\[0\] to be a string, got"),
        (lambda: SAY.choices(["a"], [["b"], ["c"]]), ValueError, "each of 1 prompts, got 2"),
        (lambda: SAY.choices(["a"], [[]]), ValueError, r"options\[0\] to hold an option, got no"),
        (lambda: SAY.choices(["a"], [["b", 1]]), TypeError, r"options\[0\]\[1\] to be a string"),
        (lambda: SAY.choices(["a"], "b"), TypeError, "options to be a sequence of them, got str"),
        (lambda: SAY.perplexity([None]), TypeError, r"texts\[0\] to be a string, got NoneType"),
    ],
)
def test_arguments_are_checked(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_a_script_is_followed():
    lm = ScriptedModel(
        {"hi": "hello there\nyou"}, {("a", " b c"): [-1.0, -2.0], ("a", " d"): -4, ("", "a b"): -6}
    )
    assert isinstance(lm, LanguageModel)
    assert lm.generate(["hi"]) == [Completion("hello there\nyou", 3, True)]
    assert lm.generate(["hi"], Sampling(stop=["\n"])) == [Completion("hello there", 2, True)]
    assert lm.generate(["hi"], Sampling(2)) == [Completion("hello there", 2, False)]
    (found,) = lm.choices(["a"], [" b c", " d"])
    assert found.values() == (-3.0, -4.0)
    assert lm.perplexity(["a b"]) == [Perplexity(-6.0, 2, 2, 3)]
    assert lm.asked == ["hi", "hi", "hi", ("a", " b c"), ("a", " d"), ("", "a b")]
    with pytest.raises(ValueError, match="expected one of the 1 lines of the script, got 'no'"):
        lm.generate(["no"])


def test_a_script_may_be_a_function():
    lm = ScriptedModel(lambda prompt: prompt[0][1], lambda prompt, text: -float(len(text)))
    assert lm.generate([[{"role": "user", "content": "x y"}]])[0].text == "x y"
    assert lm.choices(["q", "r"], ["aa", "b"])[1].best() == 1
    assert lm.logprobs(["q"], [""]) == [Score((), None)]


def test_the_protocol_needs_no_model_library():
    code = (
        "import sys, gemma_ext.lm; print(*{'transformers', 'lm_eval', 'rich'} & set(sys.modules))"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == ""
