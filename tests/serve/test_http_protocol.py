"""Lengths that nobody asked for, methods, lines of a stream, and what comes when all is said."""

import json
import math
import socket

import httpx
import pytest
from live_server import LIMITS, NAME, live, nano_tokenizer  # noqa: F401
from test_http import ASK, CHAT, post, refusal

from gemma_ext.serve.http import logprobs
from gemma_ext.serve.http.settings import Settings
from gemma_ext.serve.protocol import Token
from gemma_ext.serve.scripted import ScriptedEngine
from gemma_ext.serve.text import Vocabulary

MOST = 9


@pytest.fixture(scope="module")
def server(nano_tokenizer):  # noqa: F811
    make = lambda: ScriptedEngine(LIMITS)  # noqa: E731
    with live(nano_tokenizer, make, settings=Settings(most_tokens=MOST)) as running:
        yield running
        running.wait_idle()


def test_a_length_that_nobody_asked_for_is_one_that_may_be(server):
    chat = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    left = 4
    long = {**ASK, "prompt": [5] * (LIMITS.max_model_len - left)}
    for path, body, length in (
        ("/v1/chat/completions", chat, MOST),
        ("/v1/completions", ASK, MOST),
        ("/v1/completions", long, left),
    ):
        answer = post(server, {**body, "ignore_eos": True}, path)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == length
        refused = post(server, {**body, "max_tokens": MOST + 1}, path)
        assert refusal(refused)[:2] == (400, "max_tokens")
    full = {**ASK, "prompt": [5] * LIMITS.max_model_len}
    assert refusal(post(server, full)) == (400, "max_tokens", "context_length_exceeded")


def test_a_head_is_an_answer_without_its_body(server):
    for path in ("/health", "/v1/models", f"/v1/models/{NAME}"):
        told, whole = (ask(server.url + path) for ask in (httpx.head, httpx.get))
        assert (told.status_code, told.content) == (200, b"")
        assert told.headers["Content-Length"] == whole.headers["Content-Length"]


def test_a_refused_method_names_those_that_are_not(server):
    for method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        answer = httpx.request(method, f"{server.url}/v1/completions")
        assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


def test_what_is_no_body_behind_an_answer_ends_the_connection(server, caplog):
    with socket.create_connection(("127.0.0.1", server.server.port), 5) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert raw.recv(1000).split()[1] == b"200"
        raw.sendall(b"no chunk\r\n")
        assert raw.recv(1000) == b""
    assert not [record for record in caplog.records if record.exc_info]


def test_letters_that_end_lines_elsewhere_end_none_in_a_stream(server):
    text = "a\u2028b\u2029c\u0085d"
    body = {**ASK, "prompt": text, "echo": True, "stream": True, "max_tokens": 1}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        *events, done = [line for line in answer.iter_lines() if line]
    assert done == "data: [DONE]"
    told = [json.loads(line.removeprefix("data: ")) for line in events]
    assert "".join(part["choices"][0]["text"] for part in told).startswith(text)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_log_probabilities_that_json_does_not_have(nano_tokenizer, value):  # noqa: F811
    vocabulary = Vocabulary(nano_tokenizer)
    tokens = [(Token(5, value, ((5, value), (6, -1.0))), 0)]
    for form in (logprobs.of_completion, logprobs.of_chat):
        told = json.dumps(form(tokens, vocabulary), allow_nan=False)
        assert told.count("-9999.0") == 2
