"""The wire: bodies, keys, limits, slow and leaving clients, failure, the end of the server."""

import json
import socket
import threading
import time

import httpx
import pytest
from live_server import LIMITS, NAME, live, nano_tokenizer  # noqa: F401

from gemma_ext.serve.http.settings import Settings
from gemma_ext.serve.scripted import ScriptedEngine

ASK = {"model": NAME, "prompt": "Hello"}
LONG = {**ASK, "max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(nano_tokenizer):  # noqa: F811
    settings = Settings(most_body=20_000, most_choices=8, most_tokens=220)
    with live(nano_tokenizer, lambda: ScriptedEngine(LIMITS), settings=settings) as running:
        yield running
        running.wait_idle()


@pytest.fixture
def slow(nano_tokenizer):  # noqa: F811
    make = lambda: ScriptedEngine(LIMITS, seconds=0.02)  # noqa: E731
    with live(nano_tokenizer, make, settings=Settings(drain_seconds=2), most_open=4) as running:
        yield running


def post(server, body, path="/v1/completions", **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    return httpx.post(server.url + path, content=content, headers=headers, timeout=20, **options)


def head(length, path="/v1/completions"):
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
        "Content-Type: application/json\r\n\r\n"
    ).encode()


def refusal(answer):
    """(status, param, code) of an answer that has the API's form and one line."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return answer.status_code, error["param"], error["code"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe\x00",
        b"[" * 9_000,
        b'{"a":' * 3_000,
        b'{"model": "\\ud800", "prompt": "a"}',
        b'{"model": "scripted", "prompt": "a", "temperature": NaN}',
        b'{"model": "scripted", "prompt": "a", "temperature": 1e999}',
        b'{"model": "scripted", "prompt": "a", "seed": 99999999999999999999999999}',
        b'{"model": "scripted", "prompt": "a", "max_tokens": -99999999999999999999999}',
    ],
)
def test_malformed_bodies(server, body):
    assert refusal(post(server, body))[0] == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [1, "a"]),
        ("prompt", [[1], 2]),
        ("prompt", {"a": 1}),
        ("prompt", [-1]),
        ("prompt", [2048]),
        ("prompt", [10**30]),
        ("prompt", ["a"] * 9),
        ("prompt", 3),
        ("model", 3),
        ("n", 0),
        ("n", 9),
        ("n", 1.5),
        ("best_of", 0),
        ("max_tokens", "5"),
        ("max_tokens", -1),
        ("max_tokens", 256),
        ("max_tokens", 221),
        ("temperature", -1),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 2),
        ("min_p", -1),
        ("top_k", -1),
        ("presence_penalty", 3),
        ("frequency_penalty", "a"),
        ("repetition_penalty", 0),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"2048": 1}),
        ("logit_bias", [1]),
        ("logprobs", 21),
        ("logprobs", True),
        ("stop", ""),
        ("stop", ["a"] * 65),
        ("stop", ["a" * 1025]),
        ("stop", [1]),
        ("stop", 1),
        ("stop_token_ids", [-1]),
        ("suffix", "a"),
        ("stream", "yes"),
        ("stream_options", {"include": 1}),
        ("echo", 1),
        ("exit_threshold", "high"),
        ("min_loops", 3),
        ("max_loops", 0),
        ("max_loops", 3),
        ("seed", 2**63),
        ("user_name", "x"),
    ],
)
def test_values_that_do_not_fit_are_named(server, field, value):
    status, param, _ = refusal(post(server, {**ASK, field: value}))
    assert status == 400
    # the choices of many prompts are counted with n
    assert param == ("n" if value == ["a"] * 9 else field) or param == f"{field}.include"


@pytest.mark.parametrize("field", ["model", "prompt"])
def test_what_is_missing_is_named(server, field):
    body = {name: value for name, value in ASK.items() if name != field}
    assert refusal(post(server, body)) == (400, field, "missing_required_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2, "best_of": 1},
        {"best_of": 2, "stream": True},
        {"min_loops": 2, "max_loops": 1},
        {"prompt": "a" * 300, "max_tokens": 256},
    ],
)
def test_fields_that_do_not_go_together(server, fields):
    assert refusal(post(server, {**ASK, **fields}))[0] == 400


CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "Hi"),
        ("messages", [{"role": "king", "content": "Hi"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": 3}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        ("messages", [{"role": "user", "content": ["text"]}]),
        ("messages", [{"role": "user", "content": []}]),
        ("messages", [{"role": "system", "content": "refused by the template"}]),
        ("messages", [{"role": "user", "content": "x " * 300}]),
        ("top_logprobs", 3),
        ("logprobs", 3),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]),
        ("max_completion_tokens", -1),
        ("best_of", 2),
    ],
)
def test_chats_that_do_not_fit(server, field, value):
    status, param, _ = refusal(post(server, {**CHAT, field: value}, "/v1/chat/completions"))
    assert status == 400
    assert param in (field, "max_tokens", None) or param.startswith(field)


def test_fields_that_change_nothing_are_taken(server):
    idle = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    assert post(server, {**CHAT, **idle, "tools": []}, "/v1/chat/completions").status_code == 200


def test_another_model_is_not_found(server):
    assert refusal(post(server, {**ASK, "model": "x"})) == (404, "model", "model_not_found")
    assert refusal(httpx.get(f"{server.url}/v1/models/x"))[0] == 404
    assert httpx.get(f"{server.url}/v1/models/{NAME}").json()["loops"] == 2


def test_unknown_routes_and_methods(server):
    assert refusal(httpx.get(f"{server.url}/v2"))[0] == 404
    assert refusal(httpx.get(f"{server.url}/v1/completions"))[0] == 405


def test_a_large_body_is_refused_unread(server):
    body = {**ASK, "prompt": "a" * 30_000}
    assert refusal(post(server, body)) == (413, None, "body_too_large")

    def parts():
        for _ in range(30):
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=parts(), headers=headers)
    assert answer.status_code == 413


def test_a_lying_content_length(server):
    for length in ("9" * 30, "-1", "abc"):
        with socket.create_connection(("127.0.0.1", server.server.port), 5) as raw:
            raw.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
                "Content-Type: application/json\r\n\r\n{}".encode()
            )
            assert raw.recv(100).split()[1] in (b"413", b"400")


def test_a_body_that_does_not_come(nano_tokenizer):  # noqa: F811
    with live(nano_tokenizer, settings=Settings(body_seconds=0.2)) as running:
        with socket.create_connection(("127.0.0.1", running.server.port), 5) as raw:
            raw.sendall(head(99) + b"{")
            assert raw.recv(100).split()[1] == b"408"
        running.wait_idle()


def test_health_metrics_and_description(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    before = metric(server, "gemma_ext_output_tokens_total")
    post(server, {**ASK, "max_tokens": 7, "ignore_eos": True})
    assert metric(server, "gemma_ext_output_tokens_total") == before + 7
    assert metric(server, 'gemma_ext_exits_total{depth="1"}') >= 7
    assert metric(server, 'gemma_ext_answers_total{route="/v1/completions",status="200"}') >= 1
    assert metric(server, "gemma_ext_free_pages") == metric(server, "gemma_ext_pages")
    routes = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    body = routes["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert "exit_threshold" in body["schema"]["properties"]


def metric(server, name):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    (value,) = (line.rsplit(" ", 1)[1] for line in lines if line.rsplit(" ", 1)[0] == name)
    return float(value)


def test_keys(nano_tokenizer):  # noqa: F811
    with live(nano_tokenizer, settings=Settings(api_keys=("one", "two"))) as running:
        for given in ("", "Bearer", "Bearer onetwo", "Basic one", "one", "Bearer on\u00e9"):
            headers = {"Authorization": given.encode("latin-1")} if given else {}
            answer = post(running, ASK, headers=headers)
            assert refusal(answer) == (401, None, "invalid_api_key")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        for key in ("one", "two"):
            answer = post(running, ASK, headers={"Authorization": f"bearer {key}"})
            assert answer.status_code == 200
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
        for path in ("/health", "/metrics"):
            assert httpx.get(running.url + path).status_code == 200


def test_too_many_open_requests(slow):
    results = []

    def ask():
        results.append(post(slow, {**LONG, "max_tokens": 40}))

    threads = [threading.Thread(target=ask) for _ in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = sorted(answer.status_code for answer in results)
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 4
    refused = next(answer for answer in results if answer.status_code == 429)
    assert refusal(refused) == (429, None, "queue_full")
    assert refused.headers["Retry-After"] == "1"
    # more than ever can be open is no matter of waiting
    assert refusal(post(slow, {**LONG, "n": 5})) == (400, "n", None)
    slow.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_everything(slow, stream):
    body = json.dumps({**LONG, "stream": stream, "n": 2}).encode()
    with socket.create_connection(("127.0.0.1", slow.server.port), 5) as raw:
        raw.sendall(head(len(body)) + body)
        if stream:
            assert raw.recv(50).split()[1] == b"200"
        else:
            time.sleep(0.2)
        assert slow.engine.open == 2
    slow.wait_idle(2.0)
    assert slow.engine.stats.output_tokens < 200


def test_an_answer_that_takes_too_long(nano_tokenizer):  # noqa: F811
    make = lambda: ScriptedEngine(LIMITS, seconds=0.02)  # noqa: E731
    with live(nano_tokenizer, make, settings=Settings(request_seconds=0.2)) as running:
        assert refusal(post(running, LONG)) == (504, None, "timeout")
        events = post(running, {**LONG, "stream": True}).text.strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        running.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_engine_answers_every_request(nano_tokenizer, stream):  # noqa: F811
    make = lambda: ScriptedEngine(LIMITS, seconds=0.01, fail_at=30, running=3)  # noqa: E731
    with live(nano_tokenizer, make) as running:
        results = []

        def ask():
            results.append(post(running, {**LONG, "stream": stream}))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 6
        for answer in results:
            if stream and answer.status_code == 200:
                last = answer.text.strip().split("\n\n")[-1]
                error = json.loads(last.removeprefix("data: "))["error"]
            else:
                assert answer.status_code == 503
                error = answer.json()["error"]
            assert error["message"] == (
                "the engine failed: RuntimeError: scripted to fail at step 30"
            )
            assert error["type"] == "server_error"
        for path in ("/health", "/v1/completions"):
            answer = httpx.get(running.url + path) if path == "/health" else post(running, ASK)
            assert answer.status_code == 503
        assert metric(running, "gemma_ext_up") == 0
        assert running.engine.open == 0


def test_the_end_waits_for_open_requests(slow):
    results = []
    body = {**LONG, "max_tokens": 40}
    asking = threading.Thread(target=lambda: results.append(post(slow, body)))
    asking.start()
    while slow.engine.open == 0:
        time.sleep(0.01)
    slow.server.should_exit = True
    asking.join()
    assert results[0].status_code == 200
    assert results[0].json()["usage"]["completion_tokens"] == 40


def test_the_end_answers_what_takes_longer(nano_tokenizer):  # noqa: F811
    make = lambda: ScriptedEngine(LIMITS, seconds=0.05)  # noqa: E731
    with live(nano_tokenizer, make, settings=Settings(drain_seconds=0.3)) as running:
        results = []
        bodies = [LONG, {**LONG, "stream": True}]
        threads = [
            threading.Thread(target=lambda body=body: results.append(post(running, body)))
            for body in bodies
        ]
        for thread in threads:
            thread.start()
        while running.engine.open < 2:
            time.sleep(0.01)
        running.server.should_exit = True
        for thread in threads:
            thread.join()
    whole, stream = sorted(results, key=lambda answer: -answer.status_code)
    assert refusal(whole) == (503, None, "engine_stopped")
    last = stream.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == (
        "the server is shutting down"
    )


@pytest.mark.parametrize("field", ["most_body", "body_seconds", "most_choices", "drain_seconds"])
def test_settings_are_checked(field):
    with pytest.raises(ValueError, match=f"{field}: expected more than 0, got 0"):
        Settings(**{field: 0})
    with pytest.raises(ValueError, match="api_keys: expected keys that are not empty"):
        Settings(api_keys=("",))


def test_a_connection_that_says_nothing_is_closed(nano_tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr("gemma_ext.serve.http.server._HEAD_SECONDS", 0.2)
    with live(nano_tokenizer) as running:
        for said in (b"", b"GET /health HTTP/1.1\r\nHost:"):
            with socket.create_connection(("127.0.0.1", running.server.port), 5) as raw:
                raw.sendall(said)
                assert raw.recv(10) == b""


def test_more_connections_than_may_be(nano_tokenizer):  # noqa: F811
    with live(nano_tokenizer, settings=Settings(most_connections=3)) as running:
        address = ("127.0.0.1", running.server.port)
        held = [socket.create_connection(address, 5) for _ in range(3)]
        time.sleep(0.1)
        assert httpx.get(f"{running.url}/health").status_code == 503
        for raw in held:
            raw.close()
        time.sleep(0.1)
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_a_fault_within_a_stream_is_told(server, monkeypatch, caplog):
    monkeypatch.setattr("gemma_ext.serve.http.completions.Completion._chunks", lambda *_: 1 / 0)
    events = post(server, {**ASK, "stream": True}).text.strip().split("\n\n")
    (error,) = (json.loads(event.removeprefix("data: "))["error"] for event in events)
    assert error["message"] == "the server failed, its log says why"
    assert "ZeroDivisionError" in caplog.text
    server.wait_idle()


def test_a_fault_is_an_answer(server, monkeypatch):
    monkeypatch.setattr("gemma_ext.serve.http.completions.Completion.whole", lambda *_: 1 / 0)
    assert refusal(post(server, ASK)) == (500, None, None)
    server.wait_idle()


def test_texts_that_cannot_fit_are_not_encoded(nano_tokenizer, monkeypatch):  # noqa: F811
    with live(nano_tokenizer) as running:
        served = running.server._service.served
        monkeypatch.setattr(served, "ids", lambda *_: 1 / 0)
        letters = 257 * max(map(len, nano_tokenizer.get_vocab()))
        body = {**ASK, "prompt": "a" * letters}
        assert refusal(post(running, body)) == (400, "prompt", "context_length_exceeded")
        body = {**CHAT, "messages": [{"role": "user", "content": "a" * letters}]}
        answer = post(running, body, "/v1/chat/completions")
        assert refusal(answer) == (400, "messages", "context_length_exceeded")


def test_tokens_there_and_back(server, nano_tokenizer):  # noqa: F811
    text = "héllo <eos> wörld"
    for special in (True, False):
        body = {"prompt": text, "add_special_tokens": special}
        told = post(server, body, "/tokenize").json()
        assert told["tokens"] == nano_tokenizer(text, add_special_tokens=special)["input_ids"]
        assert told["count"] == len(told["tokens"])
    back = post(server, {"tokens": told["tokens"]}, "/detokenize").json()
    assert back == {"prompt": text}
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<bos>", "<eos>")
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 3}),
        ("/tokenize", {"prompt": "a", "model": "x"}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [2**70]}),
    ):
        assert refusal(post(server, body, path))[0] in (400, 404)
