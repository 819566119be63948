"""What an engine and its server keep does not grow with the requests that they have answered."""

import asyncio
import gc

import httpx
import numpy as np
import pytest
from live_server import LIMITS, NAME, nano_tokenizer  # noqa: F401

from gemma_ext.serve.async_engine import AsyncEngine
from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.http.app import build_app
from gemma_ext.serve.http.served import Served
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.scripted import ScriptedEngine
from gemma_ext.serve.simulate import SimulatedRunner, fixed
from gemma_ext.serve.stats import LATEST

SLACK = 500  # objects of others, among them 100 cancelled timers; of 1500 requests one each


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def scripted_engine(**options) -> Engine:
    runner = SimulatedRunner(2, *fixed(1e-3), prompts=True, fills=True)
    config = EngineConfig(width=8, max_model_len=64, prefill_tokens=32, **options)
    return Engine(runner, config, clock=lambda: runner.now)


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_cache": True},
        {"kv_pressure": "none", "pages": 5, "margin": 0.0},
        {"kv_pressure": "recompute", "pages": 5, "margin": 0.0},
    ],
    ids=["reserve", "none", "recompute"],
)
def test_an_engine_keeps_nothing_of_2000_requests(options):
    """Some cancelled while they wait, run, or after they have ended."""
    engine, random = scripted_engine(**options), np.random.default_rng(0)

    def serve(count):
        ids = []
        while len(ids) < count or engine.has_work():
            if len(ids) < count and len(engine.open) < 24:
                prompt = tuple(random.integers(0, 2, int(random.integers(1, 20))).tolist())
                most = 40 if random.random() < 0.2 else 3  # tokens; several pages, or one or two
                depths = random.integers(1, 3, most).tolist()
                ids.append(engine.submit(Request(prompt, SamplingParams(max_tokens=most)), depths))
            if ids and random.random() < 0.05:
                engine.cancel(ids[int(random.integers(0, len(ids)))])
            engine.step()
        engine.scheduler.check()

    serve(500)
    before = objects()
    serve(1500)
    assert objects() < before + SLACK
    assert len(engine.open) == len(engine.latencies._open) == engine.store.bytes == 0
    assert not any(engine.scheduler.queues().values())
    assert engine.scheduler.free_pages == engine.config.pages
    assert engine.scheduler.published_pages <= engine.config.pages
    counted = engine.scheduler.counters()
    assert counted["cancelled"] > 0
    assert (counted["preemptions"] > 0) == (options.get("kv_pressure") == "recompute")
    for kept in (engine.latencies.to_first, engine.latencies.between, engine.latencies.per_token):
        assert kept.maxlen == LATEST


def test_a_loop_keeps_nothing_of_2000_requests():
    async def scenario():
        asked = AsyncEngine(lambda: ScriptedEngine(LIMITS), most_open=64)
        await asked.start()
        params = SamplingParams(max_tokens=3)

        async def one(place):
            batch = await asked.submit(Request((1, 2), params), seconds=600)
            while place % 7 and await batch.take():
                pass
            asked.close(batch)

        async def serve(count):
            for first in range(0, count, 50):
                await asyncio.gather(*(one(first + place) for place in range(50)))

        await serve(500)
        before = objects()
        await serve(1500)
        grown = objects() - before
        held = (asked._batches, asked._unanswered)
        await asked.stop()
        assert not any(map(len, (*held, asked._places, asked._commands)))
        return grown

    assert asyncio.run(scenario()) < SLACK


def test_no_path_and_no_model_is_a_label_of_its_own(nano_tokenizer):  # noqa: F811
    """Metrics have as many lines after 300 requests to as many places as after one of each kind."""
    app = build_app(AsyncEngine(lambda: ScriptedEngine(LIMITS)), Served(NAME, nano_tokenizer))

    async def scenario():
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:

                async def ask(place):
                    await client.get(f"/nothing/{place}")
                    await client.get(f"/v1/models/{place}")
                    body = {"model": f"m{place}", "prompt": "a", f"field{place}": 1}
                    await client.post("/v1/completions", json=body)

                async def lines():
                    return len((await client.get("/metrics")).text.splitlines())

                await ask(0)
                await lines()  # counts itself
                first = await lines()
                for place in range(1, 100):
                    await ask(place)
                assert await lines() == first

    asyncio.run(scenario())
