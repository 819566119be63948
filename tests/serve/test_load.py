"""A server process under load, killed and started again: nothing lost, nothing leaked."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from live_server import LIMITS, NAME, nano_tokenizer  # noqa: F401

from gemma_ext.serve.http.output import Output
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.scripted import ScriptedEngine

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from load_serve import Load, Result, run, summary


class Process:
    """The server of scripted_server.py."""

    def __init__(self, seconds: float) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.seconds = seconds
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        script = Path(__file__).with_name("scripted_server.py")
        command = [sys.executable, str(script), str(self.port), str(self.seconds)]
        self.process = subprocess.Popen(command)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self.process.poll() is None, "the server did not start"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError("the server did not start")

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def wait_idle(self) -> dict[str, float]:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            told = self.metrics()
            held = told["gemma_ext_open"] + told["gemma_ext_running"] + told["gemma_ext_waiting"]
            if held == 0 and told["gemma_ext_pages"] == told["gemma_ext_free_pages"]:
                return told
            time.sleep(0.05)
        raise AssertionError(f"still held: {told}")


@pytest.fixture
def process(request):
    server = Process(request.param)
    server.start()
    yield server
    if server.process.poll() is None:
        server.process.kill()
        server.process.wait()


def expected_text(tokenizer, load, number):
    body = load.body(number)
    prompt = tokenizer(body["prompt"])["input_ids"]
    params = SamplingParams(
        max_tokens=body["max_tokens"], temperature=body["temperature"], seed=body["seed"],
        stop_ids=(1,),
    )  # fmt: skip
    engine = ScriptedEngine(LIMITS)
    engine.submit(Request(tuple(prompt), params))
    output, text = Output(tokenizer, prompt, ()), ""
    while engine.has_work():
        for event in engine.step():
            text += output.push(event).text
    return text


def check(tokenizer, load, results):
    assert [result.number for result in results] == list(range(load.requests))
    assert [result for result in results if result.outcome == "lost"] == []
    outcome = {
        "plain": ("answered",),
        "malformed": ("refused",),
        "disconnect": ("left", "answered"),
    }
    for result in results:
        assert result.outcome in outcome[load.kind(result.number)]
        if result.outcome == "answered":
            assert result.text == expected_text(tokenizer, load, result.number)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0.002], indirect=True)
def test_a_thousand_requests(process, nano_tokenizer):  # noqa: F811
    asyncio.run(run(Load(f"{process.url}/v1", NAME, requests=20, rate=100.0, max_tokens=4)))
    files = process.wait_idle()["process_open_fds"]
    load = Load(
        f"{process.url}/v1", NAME, requests=1000, rate=120.0, disconnect=0.15, malformed=0.1,
        max_tokens=12, retries=6, seed=1,
    )  # fmt: skip
    results = asyncio.run(run(load))
    check(nano_tokenizer, load, results)
    counts = summary(results, 1.0)
    assert counts["answered"] > 700
    assert counts["refused"] > 60
    assert counts["left"] > 80
    told = process.wait_idle()
    assert told["process_open_fds"] <= files + 2
    answers = sum(value for name, value in told.items() if "answers_total" in name)
    # some clients leave before the server has heard of them
    assert answers >= counts["answered"] + counts["refused"]
    assert process.end(signal.SIGTERM) in (0, -signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0.01], indirect=True)
def test_killed_and_started_again(process, nano_tokenizer):  # noqa: F811
    load = Load(
        f"{process.url}/v1", NAME, requests=150, rate=40.0, max_tokens=24, retries=40, seed=2
    )

    async def scenario():
        sending = asyncio.ensure_future(run(load))
        await asyncio.sleep(1.5)
        process.end(signal.SIGKILL)
        await asyncio.to_thread(process.start)
        return await sending

    results = asyncio.run(scenario())
    check(nano_tokenizer, load, results)
    assert sum(result.tries > 1 for result in results) > 5
    process.wait_idle()


@pytest.mark.parametrize("process", [0.02], indirect=True)
def test_sigterm_answers_what_is_open(process):
    body = {"model": NAME, "prompt": "a", "max_tokens": 60, "ignore_eos": True}

    async def scenario():
        async with httpx.AsyncClient(base_url=process.url, timeout=30) as client:
            asking = [
                asyncio.ensure_future(client.post("/v1/completions", json=body)) for _ in range(5)
            ]
            while process.metrics()["gemma_ext_open"] < 5:
                await asyncio.sleep(0.02)
            process.process.send_signal(signal.SIGTERM)
            answers = await asyncio.gather(*asking)
            with pytest.raises(httpx.ConnectError):
                await client.post("/v1/completions", json=body)
            return answers

    answers = asyncio.run(scenario())
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [60] * 5
    assert process.process.wait(20) in (0, -signal.SIGTERM)


def test_quantiles_of_a_summary():
    results = [
        Result(number, "answered", first=0.1, total=number, tokens=2, gaps=[0.5, 1.5])
        for number in range(101)
    ]
    results.append(Result(101, "lost", tries=3))
    row = summary(results, 2.0)
    assert (row["requests"], row["answered"], row["lost"], row["tried_again"]) == (102, 101, 1, 1)
    assert row["tokens_per_second"] == 101
    assert (row["ttft_p50"], row["latency_p50"]) == (pytest.approx(0.1), 50)
    assert row["latency_p99"] == pytest.approx(99)
    assert row["norm_latency_p50"] == 25
