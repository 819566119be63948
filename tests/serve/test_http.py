"""The wire: bodies, keys, limits, slow and leaving clients, failure, the end of the server."""

import json
import socket
import threading
import time

import httpx
import pytest
from live_server import LIMITS, NAME, live, nano_tokenizer  # noqa: F401
from pydantic import ValidationError

from gemma_ext.serve.http.errors import of_validation
from gemma_ext.serve.http.schemas import ChatBody, CompletionBody
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
    with live(nano_tokenizer, make, settings=Settings(drain_seconds=20), most_open=4) as running:
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
        ("logit_bias", {"1": 10**400}),
        ("logit_bias", {"1": True}),
        ("logit_bias", {"1": "3"}),
        ("logit_bias", {"1_0": 1}),
        ("logit_bias", {"01": 1}),
        ("logit_bias", 0),
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
        {"stream_options": {"include_usage": True}},
        {"max_tokens": 4, "min_tokens": 9},
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
@pytest.mark.parametrize("behind", [b"", b"\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_client_that_leaves_frees_everything(slow, stream, behind):
    body = json.dumps({**LONG, "stream": stream, "n": 2}).encode()
    with socket.create_connection(("127.0.0.1", slow.server.port), 5) as raw:
        raw.sendall(head(len(body)) + body)
        if stream:
            assert raw.recv(50).split()[1] == b"200"
        until(lambda: slow.engine.open == 2)
        raw.sendall(behind)
    slow.wait_idle()
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
        until(lambda: occupied(running) == 3)
        answer = httpx.get(f"{running.url}/health")
        assert refusal(answer) == (503, None, "too_many_connections")
        assert answer.headers["Connection"] == "close"
        for raw in held:
            raw.close()
        until(lambda: not occupied(running))
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


def occupied(running):
    """Connections that the server holds."""
    return len(running.server.server_state.connections)


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_read_is_given_up(nano_tokenizer, stream):  # noqa: F811
    with live(nano_tokenizer, settings=Settings(write_seconds=0.5)) as running:
        body = {**LONG, "n": 120, "stream": True, "logprobs": 20}
        content = json.dumps(body).encode()
        asked = head(len(content)) + content
        if not stream:
            asked = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
            running.server._service.served.facts["text"] = "a" * 20_000_000
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", running.server.port))
            raw.sendall(asked)
            until(lambda: occupied(running))
            until(lambda: not occupied(running), 20)
        running.wait_idle()


def test_a_client_that_reads_slowly_gets_its_answer(nano_tokenizer):  # noqa: F811
    with live(nano_tokenizer, settings=Settings(write_seconds=1.0)) as running:
        text = "a" * 5_000_000
        running.server._service.served.facts["text"] = text
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            raw.connect(("127.0.0.1", running.server.port))
            raw.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            got, began = 0, time.monotonic()
            while part := raw.recv(2**17):
                got += len(part)
                time.sleep(0.03)
        assert got > len(text)
        assert time.monotonic() - began > 1.5


def test_each_request_has_to_come_in_time(nano_tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr("gemma_ext.serve.http.server._HEAD_SECONDS", 1.0)
    with live(nano_tokenizer) as running:
        # the route of the second does not read its body
        for parts in ((b"GET ", b"/hea"), (head(9, "/health"), b"{")):
            with socket.create_connection(("127.0.0.1", running.server.port), 5) as raw:
                raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"200 OK" in raw.recv(1000)
                for part in parts:
                    raw.sendall(part)
                    time.sleep(0.1)
                while raw.recv(1000):
                    pass


def test_a_kept_connection_may_be_idle_and_an_answer_slow(nano_tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr("gemma_ext.serve.http.server._HEAD_SECONDS", 0.8)
    make = lambda: ScriptedEngine(LIMITS, seconds=0.03)  # noqa: E731
    with live(nano_tokenizer, make) as running, httpx.Client(base_url=running.url) as client:
        body = {**LONG, "max_tokens": 30}
        for _ in range(2):
            assert client.post("/v1/completions", json=body).status_code == 200
            time.sleep(0.9)
        assert occupied(running) == 1


def test_choices_are_counted_before_prompts_are_encoded(server, monkeypatch):
    monkeypatch.setattr(server.server._service.served, "ids", lambda *_: 1 / 0)
    for more in ({"prompt": ["a"] * 3000}, {"n": 9}, {"prompt": ["a", "b"], "best_of": 5}):
        assert refusal(post(server, {**ASK, **more})) == (400, "n", None)
    answer = post(server, {**CHAT, "n": 9}, "/v1/chat/completions")
    assert refusal(answer) == (400, "n", None)


def test_what_is_large_holds_up_only_what_is_large(nano_tokenizer, monkeypatch):  # noqa: F811
    with live(nano_tokenizer) as running:
        served, free = running.server._service.served, threading.Event()
        encode, begun = served.ids, threading.Event()

        def held(prompt, special):
            if len(prompt) > 2**16:
                begun.set()
                assert free.wait(20)
            return encode(prompt, special)

        monkeypatch.setattr(served, "ids", held)
        results = []
        body = {"prompt": "ab" * 2**16}
        large = threading.Thread(target=lambda: results.append(post(running, body, "/tokenize")))
        large.start()
        try:
            assert begun.wait(10)
            assert post(running, ASK).status_code == 200
            assert post(running, {"prompt": "a"}, "/tokenize").json()["count"] == 2
        finally:
            free.set()
            large.join()
        assert nano_tokenizer.decode(results[0].json()["tokens"][1:]) == body["prompt"]


def test_other_clients_come_between_prompts(nano_tokenizer, monkeypatch):  # noqa: F811
    with live(nano_tokenizer) as running:
        served, order = running.server._service.served, []
        encode = served.ids

        def slow(prompt, special):
            order.append(prompt)
            time.sleep(0.02)
            return encode(prompt, special)

        monkeypatch.setattr(served, "ids", slow)
        many = {**ASK, "prompt": ["many"] * 100, "max_tokens": 0}
        asking = threading.Thread(target=post, args=(running, many))
        asking.start()
        until(lambda: order)
        assert post(running, {**ASK, "prompt": "one"}).status_code == 200
        asking.join()
        assert order.index("one") < 90


def test_conversations_are_bounded(nano_tokenizer, monkeypatch):  # noqa: F811
    path = "/v1/chat/completions"
    with live(nano_tokenizer) as running:
        empty = {"role": "user", "content": ""}
        answer = post(running, {**CHAT, "messages": [empty] * 4097}, path)
        assert refusal(answer) == (400, "messages", None)
        monkeypatch.setattr(running.server._service.served, "ids", lambda *_: 1 / 0)
        answer = post(running, {**CHAT, "messages": [empty] * 4096}, path)
        assert refusal(answer) == (400, "messages", "context_length_exceeded")


def test_texts_and_tokens_to_convert_are_bounded(nano_tokenizer):  # noqa: F811
    with live(nano_tokenizer) as running:
        for path, body in (
            ("/tokenize", {"prompt": "a" * (2**20 + 1)}),
            ("/detokenize", {"tokens": [5] * (2**18 + 1)}),
            ("/detokenize", {"tokens": [-1] * 2**18}),
        ):
            answer = post(running, body, path)
            assert refusal(answer) == (400, next(iter(body)), None)
            assert len(answer.content) < 500


@pytest.mark.parametrize(
    ("field", "most", "more"),
    [
        ("logit_bias", {str(id): 1 for id in range(1024)}, {str(id): 1 for id in range(1025)}),
        ("stop_token_ids", [5] * 960, [5] * 961),
    ],
)
def test_tokens_that_a_request_names_are_bounded(server, field, most, more):
    assert post(server, {**ASK, field: most}).status_code == 200
    assert refusal(post(server, {**ASK, field: more})) == (400, field, None)


def test_a_fault_is_counted_as_one(nano_tokenizer, monkeypatch):  # noqa: F811
    with live(nano_tokenizer) as running:
        monkeypatch.setattr("gemma_ext.serve.http.completions.Completion.whole", lambda *_: 1 / 0)
        assert post(running, ASK).status_code == 500
        assert metric(running, 'gemma_ext_answers_total{route="/v1/completions",status="500"}') == 1


def test_what_is_no_http_is_refused_in_the_form_of_the_api(server):
    with socket.create_connection(("127.0.0.1", server.server.port), 5) as raw:
        raw.sendall(b"BAD\r\n\r\n")
        told = b""
        while part := raw.recv(4096):
            told += part
    said, _, body = told.partition(b"\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 400 Bad Request")
    answer = httpx.Response(400, content=body)
    assert refusal(answer) == (400, None, None)


@pytest.mark.parametrize("told", ["text/plain", "application/x-www-form-urlencoded", "", None])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_bodies_say_that_they_are_json(server, told, path):
    headers = {} if told is None else {"Content-Type": told}
    content = json.dumps(ASK).encode()
    answer = httpx.post(server.url + path, content=content, headers=headers)
    assert refusal(answer) == (415, None, None)


def test_json_may_name_its_letters(server):
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert post(server, ASK, headers=headers).status_code == 200


def test_an_answer_goes_back_as_it_came(server):
    message = {
        "role": "assistant", "content": "x", "refusal": None, "annotations": None, "audio": None,
        "function_call": None, "tool_calls": None,
    }  # fmt: skip
    for more in ({}, {"annotations": [], "tool_calls": []}):
        body = {**CHAT, "messages": [*CHAT["messages"], {**message, **more}, *CHAT["messages"]]}
        assert post(server, body, "/v1/chat/completions").status_code == 200
    body = {**CHAT, "messages": [{**message, "tool_calls": [{"id": "a"}]}]}
    assert refusal(post(server, body, "/v1/chat/completions"))[:2] == (400, "messages")


def test_the_context_is_no_longer_than_the_pool(nano_tokenizer):  # noqa: F811
    with live(nano_tokenizer, lambda: ScriptedEngine(LIMITS, pages=4)) as running:
        body = {name: value for name, value in CHAT.items() if name != "max_tokens"}
        answer = post(running, {**body, "ignore_eos": True}, "/v1/chat/completions")
        assert answer.json()["usage"]["total_tokens"] == 64
        assert httpx.get(f"{running.url}/v1/models").json()["data"][0]["max_model_len"] == 64
        answer = post(running, {**ASK, "prompt": [5] * 65})
        assert refusal(answer) == (400, "prompt", "context_length_exceeded")


def test_many_unknown_fields_are_one_error():
    """Of each a refusal of its own would take seconds of a body that may be sent."""
    many = {f"field{i}": i for i in range(20_000)}
    message = {"role": "user", "content": "x"}
    for kind, body, where in (
        (CompletionBody, {"model": "m", "prompt": "x", **many}, "field0"),
        (ChatBody, {"model": "m", "messages": [{**message, **many}]}, "messages.0.field0"),
        (
            ChatBody,
            {"model": "m", "messages": [message], "stream_options": many},
            "stream_options.field0",
        ),
    ):
        with pytest.raises(ValidationError) as caught:
            kind.model_validate_json(json.dumps(body))
        assert caught.value.error_count() == 1
        error = of_validation(caught.value)
        assert (error.message, error.param) == (f"{where}: no such argument", where)
        assert (error.status, error.code) == (400, "unknown_parameter")
