"""The protocol over HTTP, against a server on this machine."""

from __future__ import annotations

import math
import threading

import pytest
from fake_endpoint import TOKEN, FakeEndpoint, logprob, written

from gemma_ext.lm import (
    Completion,
    EndpointError,
    EndpointModel,
    LanguageModel,
    Sampling,
    Score,
    Usage,
)


@pytest.fixture
def server():
    made = FakeEndpoint()
    yield made
    made.close()


def lm_of(server, **options) -> EndpointModel:
    options = {"show_progress": False, "backoff": 0.01, **options}
    return EndpointModel(server.url, "counter", **options)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_completions(server, api):
    lm = lm_of(server, api=api)
    assert isinstance(lm, LanguageModel)
    prompts = ["a", "bb cc", "a"]
    assert lm.generate(prompts) == [
        Completion(written(prompt), len(TOKEN.findall(written(prompt))), True) for prompt in prompts
    ]
    assert len(server.seen) == 2  # "a" once
    (cut,) = lm.generate(["a"], Sampling(2))
    assert cut == Completion(" 1 letters", 2, False)
    (stopped,) = lm.generate(["a"], Sampling(stop=[".", "more"]))
    assert stopped == Completion(" 1 letters", 2, True)


def test_what_is_sent(server):
    lm = lm_of(server, key="secret", limit="max_completion_tokens", extra={"user": "me"})
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    lm.generate([chat], Sampling(7, 0.5, top_k=3, top_p=0.9, stop=("x",), seed=4))
    path, body, headers = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body == {
        "model": "counter",
        "messages": chat,
        "user": "me",
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stop": ["x"],
        "seed": 4,
    }


def test_the_key_of_the_environment(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    lm_of(server).generate(["a"])
    monkeypatch.setenv("OPENAI_API_KEY", "from outside")
    lm_of(server).generate(["a"])
    assert [seen[2].get("Authorization") for seen in server.seen] == [None, "Bearer from outside"]


def test_repeated_prompts_are_drawn_apart(server):
    lm = lm_of(server)
    lm.generate(["a", "a", "b"], Sampling(temperature=1.0, seed=5))
    asked = sorted((body["messages"][0]["content"], body["seed"]) for _, body, _ in server.seen)
    assert asked == [("a", 5), ("a", 6), ("b", 5)]


def test_scores_of_an_echo(server):
    lm = lm_of(server, api="completions")
    across, whole, nothing = lm.logprobs(["one tw", "one", "one"], ["o three", " two", ""])
    assert across.token_logprobs == (logprob("one", " two"), logprob("one two", " three"))
    assert across.greedy is (min(across.token_logprobs) >= -1.0)
    assert whole == Score((logprob("one", " two"),), True)
    assert nothing == Score((), True)
    (found,) = lm.choices(["one"], [" two", " a"])
    assert found.values() == (logprob("one", " two"), logprob("one", " a"))


def test_texts_from_nothing_need_a_beginning(server):
    with pytest.raises(EndpointError, match="a log-probability of every token, got none of the"):
        lm_of(server, api="completions").perplexity(["one two"])
    (found,) = lm_of(server, api="completions", begin=".").perplexity(["one two"])
    assert found.logprob == pytest.approx(logprob(".", "one") + logprob(".one", " two"))
    assert (found.tokens, found.words, found.bytes) == (2, 2, 7)


def test_parts_of_characters_are_counted_as_bytes(server):
    def split(answer):
        told = answer["choices"][0]["logprobs"]
        place = next(i for i, token in enumerate(told["tokens"]) if "é" in token)
        told["tokens"][place : place + 1] = ["bytes: \\xc3", "bytes:\\xa9"]
        for name in ("token_logprobs", "top_logprobs"):
            told[name][place : place + 1] = [told[name][place]] * 2
        return answer

    server.alter = split
    (score,) = lm_of(server, api="completions").logprobs(["one"], [" é"])
    assert score.token_logprobs == (logprob("one", " é"),) * 2


def test_choices_of_a_chat_are_the_likeliest_first_tokens(server):
    lm = lm_of(server)
    (found,) = lm.choices(["sure?"], ["Yes", "No", "Maybe"])
    yes = math.log(math.exp(-0.5) + math.exp(-2.0))
    assert found.values() == pytest.approx((yes, -1.5, -math.inf))
    assert found.best() == 0
    assert sum(found.probabilities()) == pytest.approx(1.0)
    assert [score.greedy for score in found.scores] == [True, False, False]
    assert len(server.seen) == 1
    with pytest.raises(EndpointError, match=r"one of the options \('Maybe',\) among the 20 like"):
        lm.choices(["sure?"], ["Maybe"])


@pytest.mark.parametrize(
    "call", [lambda lm: lm.logprobs(["a"], ["b"]), lambda lm: lm.perplexity(["a"])]
)
def test_a_chat_does_not_score_texts(server, call):
    with pytest.raises(NotImplementedError, match="a chat endpoint gives no log-probabilities of"):
        call(lm_of(server))
    with pytest.raises(TypeError, match="prompts of text for api='completions', got messages"):
        lm_of(server, api="completions").generate([[{"role": "user", "content": "a"}]])


def test_troubles_that_pass_are_waited_out(server):
    server.troubles = [
        (429, {"Retry-After": "0"}, "slow down"),
        (503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, "busy"),
        (0, {}, ""),
        (500, {}, "oh"),
    ]
    lm = lm_of(server)
    assert lm.generate(["a"])[0].text == written("a")
    assert lm.usage.retries == 4


def test_troubles_that_stay_are_told(server):
    server.troubles = [(429, {}, '{"error": {"message": "quota"}}')] * 3
    told = "chat/completions: no answer in 3 attempts, last: 429 Too Many Requests: quota"
    with pytest.raises(EndpointError, match=told):
        lm_of(server, retries=2).generate(["a"])
    server.troubles = [(401, {}, '{"error": {"message": "wrong key"}}')]
    with pytest.raises(EndpointError, match=r"chat/completions: 401 Unauthorized: wrong key$"):
        lm_of(server, key="hidden").generate(["a"])
    assert server.seen[-1][2]["Authorization"] == "Bearer hidden"
    assert len(server.seen) == 4
    server.close()
    with pytest.raises(EndpointError, match=r"no answer in 1 attempts, last: .*refused"):
        lm_of(server, retries=0).generate(["a"])


def test_a_key_is_not_sent_on(server):
    other = FakeEndpoint()
    server.troubles = [(302, {"Location": f"{other.url}/chat/completions"}, "")]
    with pytest.raises(EndpointError, match="302 Found"):
        lm_of(server, key="secret").generate(["a"])
    assert other.seen == []
    other.close()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ([], r"chat/completions: expected a JSON object, got b'\[\]'"),
        ({}, r"chat/completions: expected the generating answer of an OpenAI endpoint, got \{\}"),
        ({"choices": []}, "expected the generating answer of an OpenAI endpoint, got"),
        ({"choices": [{"message": None}]}, "expected the generating answer of an OpenAI endpoi"),
    ],
)
def test_answers_of_another_kind_are_refused(server, answer, sentence):
    server.alter = lambda _: answer
    with pytest.raises(EndpointError, match=sentence):
        lm_of(server).generate(["a"])


def test_an_echo_that_is_none_is_refused(server):
    def other(answer):
        answer["choices"][0]["logprobs"]["tokens"][1] = " another"
        return answer

    server.alter = other
    with pytest.raises(EndpointError, match=r"expected an echo that ends in ' two', got b' anot"):
        lm_of(server, api="completions").logprobs(["one"], [" two"])


def test_requests_run_side_by_side_and_no_more_than_allowed(server):
    server.delay = 0.1
    prompts = [str(i) for i in range(9)]
    found = lm_of(server, concurrency=3).generate(prompts)
    assert [completion.text for completion in found] == [written(prompt) for prompt in prompts]
    assert server.busiest == 3


def test_requests_keep_their_distance(server):
    lm_of(server, requests_per_minute=1200).generate([str(i) for i in range(6)])
    times = sorted(server.times)
    # 50 ms apart when they are sent; a moment later or earlier when they come
    assert times[-1] - times[0] > 0.2


def test_tokens_and_cost_are_counted(server, tmp_path):
    lm = lm_of(server, prices=(2.0, 10.0), cache=tmp_path / "answers")
    prompts = ["one two three", "four"]
    found = lm.generate(prompts)
    written_tokens = sum(completion.tokens for completion in found)
    cost = (4 * 2.0 + written_tokens * 10.0) / 1e6
    assert lm.usage == Usage(2, 0, 4, written_tokens, pytest.approx(cost))
    assert lm.generate(prompts) == found
    assert lm.usage.requests == 2
    again = lm_of(server, cache=tmp_path / "answers")
    assert again.generate(prompts) == found
    assert again.usage == Usage()
    assert lm_of(server, cache=tmp_path / "answers", extra={"x": 1}).generate(prompts) == found
    assert len(server.seen) == 4


def test_scores_are_kept_too(server, tmp_path):
    for api, ask in (
        ("chat", lambda lm: lm.choices(["a", "b"], ["Yes", "No"])),
        ("completions", lambda lm: lm.choices(["a", "b"], [" Yes", " No"])),
    ):
        before = len(server.seen)
        found = ask(lm_of(server, api=api, cache=tmp_path / "answers"))
        asked = len(server.seen)
        assert asked > before
        assert ask(lm_of(server, api=api, cache=tmp_path / "answers")) == found
        assert len(server.seen) == asked


def test_a_failure_keeps_what_was_paid_for(server, tmp_path):
    server.delay = 0.1
    server.troubles = [(400, {}, "no")]
    prompts = [str(i) for i in range(12)]
    with pytest.raises(EndpointError, match="400 Bad Request: no"):
        lm_of(server, concurrency=4, cache=tmp_path / "answers").generate(prompts)
    asked = len(server.seen)
    assert 2 <= asked < 12
    lm_of(server, cache=tmp_path / "answers").generate(prompts)
    assert len(server.seen) - asked == 12 - (asked - 1)


def test_an_interruption_keeps_what_has_come(server, tmp_path, monkeypatch):
    lm = lm_of(server, concurrency=1, cache=tmp_path / "answers")
    put, count = lm.store.put, iter(range(3))

    def interrupted(answers):
        put(answers)
        if next(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(lm.store, "put", interrupted)
    prompts = [str(i) for i in range(12)]
    with pytest.raises(KeyboardInterrupt):
        lm.generate(prompts)
    again = lm_of(server, cache=tmp_path / "answers")
    again.generate(prompts)
    assert again.usage.requests == 9
    assert threading.active_count() < 20


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"api": "speech"}, "expected api to be 'chat' or 'completions', got 'speech'"),
        ({"url": "file:///etc"}, "expected url to begin with http:// or https://, got 'file:///e"),
        ({"concurrency": 0}, "expected concurrency to be at least 1, got 0"),
        ({"retries": -1}, "expected retries to be at least 0, got -1"),
        ({"requests_per_minute": 0}, "expected requests_per_minute to be positive, got 0"),
    ],
)
def test_options_are_checked(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        EndpointModel(**{"url": "http://127.0.0.1:1/v1", "model": "m", **options})
