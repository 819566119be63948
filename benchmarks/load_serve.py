"""Load on an OpenAI-compatible server: Poisson arrivals, some clients rude, none forgotten.

    gemma-ext serve pocket &
    python benchmarks/load_serve.py --url http://localhost:8000/v1 --model pocket --rate 20
    python benchmarks/load_serve.py --requests 1000 --disconnect 0.1 --malformed 0.1 --retries 8

A request is a function of --seed and its number. Streams and whole answers take turns; a client
that disconnects leaves after its first piece, or within a whole answer; a malformed body has to be
refused with a 4xx in the form of the API. A lost connection, 429 and 503 are tried again with the
same seed, so that a server that was killed and started again gives the answer it owed. A request is
lost when its tries are over; the exit code is 1 if any was.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

AGAIN = (429, 503)
MALFORMED = (
    b"",
    b"{",
    b"[1, 2",
    b'{"model": 1}',
    b'{"model": "%s"}',
    b'{"model": "%s", "prompt": "a", "temperature": "hot"}',
    b'{"model": "%s", "prompt": "a", "max_tokens": -1}',
    b'{"model": "%s", "prompt": [1, "a"]}',
    b'{"model": "%s", "prompt": "a", "no_such_field": 1}',
    b'{"model": "no such model", "prompt": "a"}',
    b"\xff\xfe{}",
    b"[" * 5000,
)
WORDS = ("def", "class", "return", "import", "self", "for", "in", "if", "not", "value", "key")


@dataclass
class Result:
    """What became of one request.

    Attributes:
        outcome: answered, left (the client did, as planned), refused (as it deserved) or lost.
        why: of a lost one.
        first, total: seconds from the start of the last try to the first piece and the end.
        gaps: seconds between pieces of a stream.
    """

    number: int
    outcome: str = "lost"
    why: str = ""
    text: str = ""
    tries: int = 0
    first: float | None = None
    total: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """Options of a run, as in the command line."""

    url: str
    model: str
    requests: int = 100
    rate: float = 10.0
    disconnect: float = 0.0
    malformed: float = 0.0
    retries: int = 0
    max_tokens: int = 32
    words: int = 16
    temperature: float = 1.0
    seed: int = 0
    key: str | None = None
    timeout: float = 120.0

    def kind(self, number: int) -> str:
        draw = random.Random(f"{self.seed} kind {number}").random()
        if draw < self.malformed:
            return "malformed"
        return "disconnect" if draw < self.malformed + self.disconnect else "plain"

    def body(self, number: int) -> dict[str, Any]:
        draw = random.Random(f"{self.seed} body {number}")
        return {
            "model": self.model,
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, self.words))),
            "max_tokens": draw.randint(1, self.max_tokens),
            "temperature": self.temperature,
            "seed": number,
            "stream": number % 2 == 0,
        }


class Server(Exception):
    """An answer that promises another try."""


async def run(load: Load) -> list[Result]:
    """Sends all requests; the results in the order of their numbers."""
    draw = random.Random(f"{load.seed} arrivals")
    headers = {"Authorization": f"Bearer {load.key}"} if load.key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    tasks = []
    async with httpx.AsyncClient(
        base_url=load.url, headers=headers, timeout=load.timeout, limits=limits
    ) as client:
        start, at = time.monotonic(), 0.0
        for number in range(load.requests):
            at += draw.expovariate(load.rate)
            await asyncio.sleep(max(0.0, start + at - time.monotonic()))
            tasks.append(asyncio.ensure_future(_persist(client, load, number)))
        return await asyncio.gather(*tasks)


async def _persist(client: httpx.AsyncClient, load: Load, number: int) -> Result:
    kind = load.kind(number)
    for tries in range(1, load.retries + 2):
        result = Result(number, tries=tries)
        began = time.monotonic()
        try:
            if kind == "malformed":
                await _malformed(client, load, result)
            elif load.body(number)["stream"]:
                await _stream(client, load, result, leave=kind == "disconnect")
            else:
                await _whole(client, load, result, leave=kind == "disconnect")
        except (httpx.TransportError, Server) as error:
            result.outcome, result.why = "lost", f"{type(error).__name__}: {error}"
            result.text, result.gaps = "", []
            await asyncio.sleep(min(2.0, 0.1 * 2**tries) * random.uniform(0.5, 1.0))
            continue
        result.total = time.monotonic() - began
        return result
    return result


async def _whole(client: httpx.AsyncClient, load: Load, result: Result, leave: bool) -> None:
    began = time.monotonic()
    asking = client.post("completions", json=load.body(result.number))
    if leave:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asking, random.uniform(0.0, 0.05))
        result.outcome = "left"
        return
    answer = await asking
    if answer.status_code in AGAIN:
        raise Server(f"{answer.status_code} {answer.text[:200]}")
    if answer.status_code != 200:
        result.why = f"{answer.status_code} {answer.text[:200]}"
        return
    said = answer.json()
    result.first = time.monotonic() - began
    result.text, result.tokens = said["choices"][0]["text"], said["usage"]["completion_tokens"]
    result.outcome = "answered"


async def _stream(client: httpx.AsyncClient, load: Load, result: Result, leave: bool) -> None:
    began = last = time.monotonic()
    body = load.body(result.number)
    async with client.stream("POST", "completions", json=body) as answer:
        if answer.status_code != 200:
            text = (await answer.aread()).decode("utf-8", "replace")[:200]
            if answer.status_code in AGAIN:
                raise Server(f"{answer.status_code} {text}")
            result.why = f"{answer.status_code} {text}"
            return
        ended = False
        async for data in _events(answer):
            if data == "[DONE]":
                ended = True
                break
            chunk = json.loads(data)
            if "error" in chunk:
                raise Server(chunk["error"]["message"])
            now = time.monotonic()
            if result.first is None:
                result.first = now - began
            else:
                result.gaps.append(now - last)
            last = now
            result.tokens += 1
            result.text += chunk["choices"][0]["text"]
            if leave:
                result.outcome = "left"
                return
        if not ended:
            raise Server("the stream broke off")
    result.outcome = "answered"


async def _events(answer: httpx.Response) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


async def _malformed(client: httpx.AsyncClient, load: Load, result: Result) -> None:
    body = MALFORMED[result.number % len(MALFORMED)].replace(b"%s", load.model.encode())
    headers = {"Content-Type": "application/json"}
    answer = await client.post("completions", content=body, headers=headers)
    if answer.status_code in AGAIN:
        raise Server(f"{answer.status_code} {answer.text[:200]}")
    message = answer.json()["error"]["message"]
    if 400 <= answer.status_code < 500 and message:
        result.outcome = "refused"
    else:
        result.why = f"{answer.status_code} {answer.text[:200]}"


def summary(results: list[Result], seconds: float) -> dict[str, Any]:
    """Counts and quantiles of a run."""
    answered = [result for result in results if result.outcome == "answered"]
    row: dict[str, Any] = {
        "requests": len(results),
        **dict.fromkeys(("answered", "left", "refused", "lost"), 0),
        **Counter(result.outcome for result in results),
        "tried_again": sum(result.tries > 1 for result in results),
        "tokens_per_second": sum(result.tokens for result in answered) / seconds,
    }
    streams = [result for result in answered if result.gaps]
    for name, values in (
        ("ttft", [result.first for result in streams]),
        ("tpot", [gap for result in streams for gap in result.gaps]),
        ("latency", [result.total for result in answered]),
        ("norm_latency", [result.total / max(result.tokens, 1) for result in answered]),
    ):
        row[f"{name}_p50"], row[f"{name}_p99"] = _quantiles(values)
    return row


def _quantiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values * 2 or [float("nan")] * 2)[:2]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="pocket", help="as the server calls it")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rate", type=float, default=10.0, help="arrivals per second, on average")
    parser.add_argument("--disconnect", type=float, default=0.0, help="share of clients that leave")
    parser.add_argument("--malformed", type=float, default=0.0, help="share of malformed bodies")
    parser.add_argument("--retries", type=int, default=0, help="of 429, 503 and lost connections")
    parser.add_argument("--max-tokens", type=int, default=32, help="outputs have 1 to so many")
    parser.add_argument("--words", type=int, default=16, help="prompts have 1 to so many")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jsonl", help="file to append the summary to")
    options = vars(parser.parse_args())
    path = options.pop("jsonl")
    load = Load(**options, key=os.environ.get("OPENAI_API_KEY"))
    began = time.monotonic()
    results = asyncio.run(run(load))
    row = summary(results, time.monotonic() - began)
    for name, value in row.items():
        print(f"{name:20} {value:.4f}" if isinstance(value, float) else f"{name:20} {value}")
    for result in results:
        if result.outcome == "lost":
            print(f"request {result.number}: {result.why}", file=sys.stderr)
    if path:
        with open(path, "a") as file:
            file.write(json.dumps({**options, **row}) + "\n")
    sys.exit(bool(row["lost"]))


if __name__ == "__main__":
    main()
