"""Two replicas behind Ray Serve: one address, answers as of one engine, a dead one replaced."""

import asyncio
import os
import signal
import sys
import time
from importlib.util import find_spec

import openai
import pytest
from live_server import LIMITS, NAME

from gemma_ext.serve.async_engine import AsyncEngine
from gemma_ext.serve.http.app import build_app
from gemma_ext.serve.http.served import Served
from gemma_ext.serve.launch import Launch
from gemma_ext.serve.replicas import deploy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("ray", "grpc")), reason="needs ray[serve]"
    ),
]


POISON = 7  # a prompt that its engine does not survive


class Scripted(Launch):
    """A launch without weights."""

    def app(self):
        from gemma_ext.pocket import load_text
        from gemma_ext.serve.scripted import ScriptedEngine, random_bigrams

        bigrams = random_bigrams(LIMITS.vocabulary)

        def logits(ids):
            return bigrams(ids) if ids[0] != POISON else 1 / 0

        engine = AsyncEngine(lambda: ScriptedEngine(LIMITS, logits, seconds=0.005))
        facts = {"process": os.getpid()}
        served = Served(NAME, load_text("nano").tokenizer, (1,), facts=facts)
        return build_app(engine, served, self.settings)


@pytest.fixture(scope="module")
def url():
    import socket

    import ray
    from ray import cloudpickle, serve

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # on a busy machine a proxy takes longer than Serve's 5 s to start, and is killed for it
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "100")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        deploy(Scripted(), 2, port=port, cpus=0.5)
        yield f"http://127.0.0.1:{port}/v1"
        serve.shutdown()
    finally:
        ray.shutdown()


def test_replicas_answer_as_one(url):
    async def scenario():
        client = openai.AsyncOpenAI(base_url=url, api_key="none", timeout=60)
        options = {"model": NAME, "prompt": "a", "temperature": 1.0}
        async with client:
            answers = await asyncio.gather(
                *(client.completions.create(**options, seed=seed % 5) for seed in range(40))
            )
            told = [(await client.models.list()).data[0].process for _ in range(20)]
            stream = await client.completions.create(**options, seed=0, stream=True)
            pieces = [chunk.choices[0].text async for chunk in stream]
            with pytest.raises(openai.BadRequestError, match="temperature: expected a number"):
                await client.completions.create(**{**options, "temperature": -1})
            return answers, set(told), "".join(pieces)

    answers, processes, text = asyncio.run(scenario())
    texts = [answer.choices[0].text for answer in answers]
    assert texts == texts[:5] * 8
    assert text == texts[0]
    assert len(processes) == 2


def test_a_dead_replica_is_replaced(url):
    client = openai.OpenAI(base_url=url, api_key="none", timeout=20, max_retries=10)

    def processes():
        return {client.models.list().data[0].process for _ in range(10)}

    before = processes()
    killed = before.pop()
    os.kill(killed, signal.SIGKILL)
    answer = client.completions.create(model=NAME, prompt="a", seed=1)
    assert answer.usage.completion_tokens > 0
    end = time.monotonic() + 200
    while len(now := processes()) < 2 or killed in now:
        assert time.monotonic() < end, f"{killed} was not replaced: {now}"
        time.sleep(0.5)


def test_a_replica_whose_engine_failed_is_replaced(url):
    client = openai.OpenAI(base_url=url, api_key="none", timeout=20, max_retries=0)
    before = {client.models.list().data[0].process for _ in range(10)}
    with pytest.raises(openai.InternalServerError, match="the engine failed: ZeroDivisionError"):
        client.completions.create(model=NAME, prompt=[POISON])
    client, end = client.with_options(max_retries=10), time.monotonic() + 200
    while len(before & {client.models.list().data[0].process for _ in range(10)}) == 2:
        assert time.monotonic() < end, "the failed replica was not replaced"
        time.sleep(1)
    answer = client.completions.create(model=NAME, prompt="a", seed=1)
    assert answer.usage.completion_tokens > 0


def test_fewer_than_one():
    with pytest.raises(ValueError, match="replicas: expected at least 1, got 0"):
        deploy(Launch(), 0)
