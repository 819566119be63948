"""The `openai` client against a live server: what it reads is what the engine drew."""

import asyncio
import math

import openai
import pytest
from live_server import EOS, LIMITS, NAME, TEMPLATE, live, nano_tokenizer  # noqa: F401

from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.scripted import ScriptedEngine, random_bigrams

BIGRAMS = random_bigrams(LIMITS.vocabulary, seed=3)
PROMPT = "def f(x):\n"


def depth(ids):
    return 1 + len(ids) % 2


def engine():
    return ScriptedEngine(LIMITS, BIGRAMS, depth=depth)


@pytest.fixture(scope="module")
def server(nano_tokenizer):  # noqa: F811
    with live(nano_tokenizer, engine) as running:
        yield running
        running.wait_idle()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def drawn(prompt, choice=0, prompt_logprobs=None, **params):
    """The events of one request alone in an engine."""
    params = {"stop_ids": (EOS,), "max_tokens": 16, **params}
    alone = engine()
    request = Request(tuple(prompt), SamplingParams(**params), choice, prompt_logprobs)
    alone.submit(request)
    events = []
    while alone.has_work():
        events += alone.step()
    return events


def text_of(tokenizer, events):
    return tokenizer.decode([event.token.id for event in events], skip_special_tokens=True)


def test_a_completion_is_what_the_engine_draws(client, nano_tokenizer):  # noqa: F811
    ids = nano_tokenizer(PROMPT)["input_ids"]
    assert ids[0] == nano_tokenizer.bos_token_id
    events = drawn(ids, seed=5, max_tokens=12)
    answer = client.completions.create(model=NAME, prompt=PROMPT, seed=5, max_tokens=12)
    (choice,) = answer.choices
    assert choice.text == text_of(nano_tokenizer, events)
    assert choice.finish_reason == events[-1].finish_reason
    assert choice.logprobs is None
    assert answer.object == "text_completion"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(events))
    assert usage.total_tokens == len(ids) + len(events)
    depths = [event.token.exit_depth for event in events]
    assert usage.mean_exit_depth == sum(depths) / len(depths)


def test_defaults_are_those_of_the_api(client):
    answer = client.completions.create(model=NAME, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16
    draws = {client.completions.create(model=NAME, prompt=PROMPT).choices[0].text for _ in range(4)}
    assert len(draws) > 1  # temperature 1, a seed of its own each time


def test_every_option_reaches_the_engine(client, nano_tokenizer):  # noqa: F811
    options = {
        "max_tokens": 30,
        "temperature": 1.7,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.3,
        "seed": -7,
    }
    extra = {
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "min_tokens": 20,
        "stop_token_ids": list(range(0, 2048, 7)),
        "max_loops": 1,
    }
    bias = {"17": 3, "99": -100}
    ids = nano_tokenizer(PROMPT)["input_ids"]
    params = {**options, **extra, "logit_bias": {17: 3.0, 99: -100.0}}
    del params["stop_token_ids"]
    events = drawn(ids, **{**params, "stop_ids": (EOS, *extra["stop_token_ids"])})
    assert events[-1].finish_reason == "stop"
    assert len(events) > 20
    answer = client.completions.create(
        model=NAME, prompt=PROMPT, **options, logit_bias=bias, extra_body=extra
    )
    assert answer.choices[0].text == text_of(nano_tokenizer, events[:-1])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(events)
    assert answer.usage.mean_exit_depth == 1


@pytest.mark.parametrize("name", ["exit_threshold", "min_loops", "max_loops"])
def test_loop_options_reach_the_engine(nano_tokenizer, name):  # noqa: F811
    seen = []

    class Spy(ScriptedEngine):
        def submit(self, request):
            seen.append(request.params)
            return super().submit(request)

    with live(nano_tokenizer, lambda: Spy(LIMITS)) as running:
        client = running.client()
        client.completions.create(model=NAME, prompt="a", extra_body={name: 2})
        message = [{"role": "user", "content": "a"}]
        client.chat.completions.create(model=NAME, messages=message, extra_body={name: 2})
    assert [getattr(params, name) for params in seen] == [2, 2]


def test_exit_depths(client, nano_tokenizer):  # noqa: F811
    ids = nano_tokenizer(PROMPT)["input_ids"]
    expected = [event.token.exit_depth for event in drawn(ids, seed=1, max_tokens=9)]
    assert set(expected) == {1, 2}
    extra = {"return_exit_depths": True}
    options = {"model": NAME, "seed": 1, "max_tokens": 9, "extra_body": extra}
    whole = client.completions.create(prompt=PROMPT, **options)
    assert whole.choices[0].exit_depths == expected
    *_, last = client.completions.create(prompt=PROMPT, stream=True, **options)
    assert last.choices[0].exit_depths == expected


def test_batches_of_prompts_of_every_kind(client, nano_tokenizer):  # noqa: F811
    texts = ["one", "two", "three"]
    ids = [nano_tokenizer(text)["input_ids"] for text in texts]
    options = {"model": NAME, "seed": 2, "n": 2}
    by_text = client.completions.create(prompt=texts, **options)
    by_ids = client.completions.create(prompt=ids, **options)
    assert [choice.index for choice in by_text.choices] == list(range(6))
    told = [choice.text for choice in by_text.choices]
    assert told == [choice.text for choice in by_ids.choices]
    expected = [
        text_of(nano_tokenizer, drawn(prompt, choice, seed=2))
        for prompt in ids
        for choice in (0, 1)
    ]
    assert told == expected
    alone = client.completions.create(prompt=ids[1], **options)
    assert [choice.text for choice in alone.choices] == told[2:4]
    assert by_text.usage.prompt_tokens == sum(map(len, ids))


def test_texts_without_special_tokens(client, nano_tokenizer):  # noqa: F811
    bare = nano_tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    answer = client.completions.create(
        model=NAME, prompt=PROMPT, seed=0, extra_body={"add_special_tokens": False}
    )
    assert answer.usage.prompt_tokens == len(bare)
    with pytest.raises(openai.BadRequestError, match="expected at least one token, got none"):
        client.completions.create(model=NAME, prompt="", extra_body={"add_special_tokens": False})


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_whole_in_pieces(client, n):
    options = {"model": NAME, "prompt": PROMPT, "seed": 4, "n": n, "max_tokens": 40, "logprobs": 3}
    whole = client.completions.create(**options)
    chunks = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.to_dict() == whole.usage.to_dict()
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for expected in whole.choices:
        parts = [
            choice for chunk in chunks for choice in chunk.choices if choice.index == expected.index
        ]
        assert "".join(part.text for part in parts) == expected.text
        assert len(parts) > 5
        assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1].finish_reason == expected.finish_reason
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [item for part in parts for item in getattr(part.logprobs, name)]
            assert joined == getattr(expected.logprobs, name)


def test_logprobs_of_completions(client, nano_tokenizer):  # noqa: F811
    ids = nano_tokenizer(PROMPT)["input_ids"]
    events = drawn(ids, seed=6, logprobs=2)
    answer = client.completions.create(model=NAME, prompt=PROMPT, seed=6, logprobs=2)
    told = answer.choices[0].logprobs
    assert told.token_logprobs == [event.token.logprob for event in events]
    for top, event in zip(told.top_logprobs, events, strict=True):
        assert {value for _, value in event.token.top} <= set(top.values())
        assert event.token.logprob in top.values()
        assert 2 <= len(top) <= 3
    text = answer.choices[0].text
    ends = [*told.text_offset[1:], len(text)]
    for token, start, end in zip(told.tokens, told.text_offset, ends, strict=True):
        if not token.startswith("bytes:"):
            assert text[start:end].startswith(token)


def test_echo_scores_the_prompt(client, nano_tokenizer):  # noqa: F811
    ids = nano_tokenizer("héllo")["input_ids"]
    scored = drawn(ids, seed=0, max_tokens=1, logprobs=1, prompt_logprobs=1)[0]
    answer = client.completions.create(
        model=NAME, prompt="héllo", echo=True, logprobs=1, max_tokens=1, seed=0
    )
    (choice,) = answer.choices
    told = choice.logprobs
    assert choice.text.startswith("héllo")
    assert len(told.tokens) == len(ids) + 1
    assert told.tokens[0] == "<bos>"
    assert told.token_logprobs[0] is told.top_logprobs[0] is None
    assert told.token_logprobs[1:-1] == [token.logprob for token in scored.prompt[1:]]
    assert told.text_offset[0] == told.text_offset[1] == 0
    assert told.text_offset[-1] == len("héllo")
    same = client.completions.create(
        model=NAME, prompt=ids, echo=True, logprobs=1, max_tokens=1, seed=0, stream=True
    )
    first, *rest = same
    assert first.choices[0].text.startswith("héllo")
    tokens = [token for part in (first, *rest) for token in part.choices[0].logprobs.tokens]
    assert tokens == told.tokens


def test_echo_alone(client):
    options = {"model": NAME, "prompt": ["abc", "de"], "echo": True, "max_tokens": 0}
    answer = client.completions.create(**options)
    assert [choice.text for choice in answer.choices] == ["abc", "de"]
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.usage.completion_tokens == 0
    assert answer.usage.mean_exit_depth is None
    texts = ["", ""]
    for chunk in client.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["abc", "de"]


def test_the_best_of_many(client, nano_tokenizer):  # noqa: F811
    ids = nano_tokenizer(PROMPT)["input_ids"]
    outputs = [drawn(ids, choice, seed=8, logprobs=0) for choice in range(5)]
    means = [math.fsum(event.token.logprob for event in events) / len(events) for events in outputs]
    order = sorted(range(5), key=lambda place: -means[place])
    answer = client.completions.create(model=NAME, prompt=PROMPT, seed=8, n=2, best_of=5)
    assert [choice.text for choice in answer.choices] == [
        text_of(nano_tokenizer, outputs[place]) for place in order[:2]
    ]
    assert answer.usage.completion_tokens == sum(map(len, outputs))
    assert answer.choices[0].logprobs is None


def long_text(client):
    options = {"model": NAME, "prompt": PROMPT, "seed": 9, "max_tokens": 60}
    return options, client.completions.create(**options).choices[0].text


def test_stop_strings_cut_and_cancel(server, client):
    options, text = long_text(client)
    stop = text[40:45]
    place = text.find(stop)
    cut = client.completions.create(**options, stop=stop, logprobs=0)
    (choice,) = cut.choices
    assert (choice.text, choice.finish_reason) == (text[:place], "stop")
    assert cut.usage.completion_tokens < 60
    assert choice.logprobs.text_offset[-1] < len(choice.text)
    assert (
        client.completions.create(**options, stop=["never", stop]).choices[0].text == text[:place]
    )
    parts = list(client.completions.create(**options, stop=stop, stream=True))
    assert "".join(part.choices[0].text for part in parts) == text[:place]
    assert parts[-1].choices[0].finish_reason == "stop"
    server.wait_idle()
    assert server.engine.stats.running == 0


def test_a_stop_string_that_only_begins_is_told(client):
    options, text = long_text(client)
    stop = text[-2:] + "\N{SNOWMAN}"
    assert client.completions.create(**options, stop=stop).choices[0].text == text


MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "so?"}],
    },
]
RENDERED = "<bos>[user] Hi\n[assistant] Hello\n[user] How so?\n[assistant] "


def test_a_chat_goes_through_the_template(client, nano_tokenizer):  # noqa: F811
    ids = nano_tokenizer(RENDERED, add_special_tokens=False)["input_ids"]
    assert ids.count(nano_tokenizer.bos_token_id) == 1
    events = drawn(ids, seed=11, max_tokens=10)
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, seed=11, max_completion_tokens=10
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == text_of(nano_tokenizer, events)
    assert choice.finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len(ids)


def test_a_chat_may_fill_the_context(client):
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == LIMITS.max_model_len
    assert answer.choices[0].finish_reason == "length"


def test_a_chat_in_pieces_with_logprobs(client, nano_tokenizer):  # noqa: F811
    options = {
        "model": NAME,
        "messages": MESSAGES,
        "seed": 12,
        "max_tokens": 20,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.to_dict() == whole.usage.to_dict()
    ids = nano_tokenizer(RENDERED, add_special_tokens=False)["input_ids"]
    for expected in whole.choices:
        parts = [
            choice for chunk in chunks for choice in chunk.choices if choice.index == expected.index
        ]
        assert parts[0].delta.role == "assistant"
        assert parts[0].delta.content == ""
        assert "".join(part.delta.content or "" for part in parts) == expected.message.content
        assert parts[-1].finish_reason == expected.finish_reason
        entries = [entry for part in parts for entry in part.logprobs.content]
        assert entries == expected.logprobs.content
        events = drawn(ids, expected.index, seed=12, max_tokens=20, logprobs=2)
        assert [entry.logprob for entry in entries] == [event.token.logprob for event in events]
        assert all(len(entry.top_logprobs) == 2 for entry in entries)
        raw = b"".join(bytes(entry.bytes) for entry in entries)
        assert raw.decode("utf-8", "replace") == expected.message.content


def test_a_model_without_a_template(nano_tokenizer):  # noqa: F811
    with live(nano_tokenizer) as running:
        running.server._service.served.chat_template = None
        with pytest.raises(openai.BadRequestError, match="this model has no chat template"):
            running.client().chat.completions.create(model=NAME, messages=MESSAGES)
        nano_tokenizer.chat_template = TEMPLATE
        try:
            answer = running.client().chat.completions.create(
                model=NAME, messages=MESSAGES, max_tokens=1
            )
            assert answer.usage.completion_tokens == 1
        finally:
            nano_tokenizer.chat_template = None


def test_errors_are_those_the_client_knows(server, client):
    for options, kind, param in (
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"max_tokens": 1000}, openai.BadRequestError, "max_tokens"),
        ({"n": 500}, openai.BadRequestError, "n"),
    ):
        with pytest.raises(kind) as raised:
            client.completions.create(**{"model": NAME, "prompt": "a", **options})
        assert raised.value.body["param"] == param
        assert raised.value.body["type"] == "invalid_request_error"
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).max_model_len == LIMITS.max_model_len


def test_a_failure_within_a_stream_is_raised(nano_tokenizer):  # noqa: F811
    with live(nano_tokenizer, lambda: ScriptedEngine(LIMITS, fail_at=5)) as running:
        stream = running.client().completions.create(
            model=NAME, prompt="a", stream=True, extra_body={"ignore_eos": True}
        )
        with pytest.raises(openai.APIError, match="scripted to fail at step 5"):
            list(stream)


def test_many_at_a_time_are_as_one_after_another(server, nano_tokenizer):  # noqa: F811
    prompts = [f"prompt {place}" for place in range(40)]

    async def ask():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        async with client:
            return await asyncio.gather(
                *(
                    client.completions.create(model=NAME, prompt=prompt, seed=place)
                    for place, prompt in enumerate(prompts)
                )
            )

    for place, answer in enumerate(asyncio.run(ask())):
        ids = nano_tokenizer(prompts[place])["input_ids"]
        assert answer.choices[0].text == text_of(nano_tokenizer, drawn(ids, seed=place))
