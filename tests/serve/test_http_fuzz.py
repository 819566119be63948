"""Whatever JSON comes: an answer or a refusal in the API's form, and nothing held afterwards."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import LIMITS, NAME, live, nano_tokenizer  # noqa: F401

from gemma_ext.serve.http.schemas import ChatBody, CompletionBody
from gemma_ext.serve.scripted import ScriptedEngine

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.5, 1.0, "auto", "text", "user", "a"]),
    st.text(max_size=5),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "7"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": VALUES}),
    max_size=2,
)


@pytest.fixture(scope="module")
def server(nano_tokenizer):  # noqa: F811
    with live(nano_tokenizer, lambda: ScriptedEngine(LIMITS)) as running:
        yield running
        running.wait_idle()


def check(server, path, body):
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    answer = server.http.post(server.url + path, content=content)
    if answer.status_code != 200:
        assert answer.status_code in (400, 404), (answer.text, body)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
    elif "event-stream" in answer.headers["content-type"]:
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.json()["choices"]


def fields(kind):
    names = sorted(set(kind.model_fields) - {"model", "prompt", "messages"})
    return st.dictionaries(st.sampled_from(names), VALUES, max_size=3)


@pytest.fixture(autouse=True)
def _client(server):
    headers = {"Content-Type": "application/json"}
    with httpx.Client(timeout=20, headers=headers) as client:
        server.http = client
        yield


FUZZ = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(prompt=st.one_of(st.text(max_size=8), VALUES), more=fields(CompletionBody))
def test_completions(server, prompt, more):
    check(server, "/v1/completions", {"model": NAME, "prompt": prompt, "max_tokens": 3, **more})


@FUZZ
@given(messages=st.one_of(MESSAGES, VALUES), more=fields(ChatBody))
def test_chats(server, messages, more):
    body = {"model": NAME, "messages": messages, "max_tokens": 3, **more}
    check(server, "/v1/chat/completions", body)


@FUZZ
@given(body=VALUES)
def test_any_json(server, body):
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = server.http.post(server.url + path, content=content)
        assert answer.status_code in (200, 400, 404), answer.text
