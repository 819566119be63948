"""An engine in a thread: events in order, cancellation, bounds, failure, end."""

import asyncio
import threading
import time

import pytest

from gemma_ext.serve.async_engine import AsyncEngine
from gemma_ext.serve.batch import EngineBusy, EngineStopped, RequestExpired
from gemma_ext.serve.protocol import Limits, Request, SamplingParams
from gemma_ext.serve.scripted import ScriptedEngine

LIMITS = Limits(vocabulary=64, loops=2, max_model_len=128)
LONG = SamplingParams(max_tokens=100)


def ask(*lengths, **options):
    return [
        Request((1, 2, place), SamplingParams(max_tokens=length, seed=place), **options)
        for place, length in enumerate(lengths)
    ]


def run(scenario, *, most_open=64, stall_seconds=60.0, **options):
    """`scenario(engine, the scripted engine behind it)`, and nothing held after it."""

    async def main():
        made = []

        def make():
            made.append(ScriptedEngine(LIMITS, **options))
            return made[0]

        engine = AsyncEngine(make, most_open=most_open, stall_seconds=stall_seconds)
        await engine.start()
        try:
            await scenario(engine, made[0])
        finally:
            await engine.stop()
        assert not engine._thread.is_alive()

    asyncio.run(asyncio.wait_for(main(), 30))


async def collect(engine, batch):
    """(tokens, finish reason) of each request."""
    told = [([], []) for _ in batch.requests]
    while taken := await batch.take():
        for place, event in taken:
            if event.token is not None:
                told[place][0].append(event.token.id)
            if event.finish_reason is not None:
                told[place][1].append(event.finish_reason)
    engine.close(batch)
    return told


async def until_the_end(batch):
    while await batch.take():
        pass


def sequential(request):
    engine = ScriptedEngine(LIMITS)
    engine.submit(request)
    tokens = []
    while engine.has_work():
        tokens += [event.token.id for event in engine.step() if event.token is not None]
    return tokens


async def idle(scripted, seconds=5.0):
    end = time.monotonic() + seconds
    while scripted.has_work() or scripted.stats().free_pages < scripted.pages:
        assert time.monotonic() < end, "the engine still holds something"
        await asyncio.sleep(0.005)


def test_tokens_are_those_of_each_request_alone():
    async def scenario(engine, scripted):
        requests = ask(1, 5, 9, 3)
        batches = [await engine.submit(*requests[:2]), await engine.submit(*requests[2:])]
        told = [one for batch in batches for one in await collect(engine, batch)]
        assert [tokens for tokens, _ in told] == [sequential(request) for request in requests]
        assert all(reasons == ["length"] for _, reasons in told)
        assert engine.open == 0
        assert engine.stats.output_tokens == 18

    run(scenario)


def test_all_calls_happen_in_one_thread():
    async def scenario(engine, scripted):
        seen = set()
        for name in ("submit", "cancel", "step", "has_work", "stats"):
            method = getattr(scripted, name)

            def spy(*arguments, method=method):
                seen.add(threading.current_thread().name)
                return method(*arguments)

            setattr(scripted, name, spy)
        batch = await engine.submit(*ask(100, 3))
        await batch.take()
        engine.close(batch)
        await asyncio.sleep(0.05)
        assert seen == {"engine"}

    run(scenario, seconds=0.001)


def test_closing_frees_what_is_not_ended():
    async def scenario(engine, scripted):
        batch = await engine.submit(*ask(100, 100, 1))
        await batch.take()
        engine.close(batch)
        engine.close(batch)
        await idle(scripted)
        assert engine.stats.output_tokens < 201
        assert await batch.take() == []

    run(scenario, seconds=0.005)


def test_cancelling_one_of_a_batch_leaves_the_others():
    async def scenario(engine, scripted):
        requests = ask(100, 4)
        batch = await engine.submit(*requests)
        engine.cancel(batch, 0)
        engine.cancel(batch, 0)
        told = await collect(engine, batch)
        assert told[1] == (sequential(requests[1]), ["length"])
        assert told[0][1] == []
        await idle(scripted)

    run(scenario, seconds=0.005)


def test_all_of_a_batch_or_none():
    async def scenario(engine, scripted):
        bad = Request((1, 99))
        with pytest.raises(ValueError, match="prompt: expected tokens below the vocabulary of 64"):
            await engine.submit(*ask(100, 100), bad)
        assert engine.open == 0
        await idle(scripted)

    run(scenario, seconds=0.001)


def test_no_more_than_may_be_open():
    async def scenario(engine, scripted):
        batch = await engine.submit(*ask(50, 50))
        with pytest.raises(EngineBusy, match="2 of 3 requests are open, try again later"):
            await engine.submit(*ask(1, 1))
        more = await engine.submit(*ask(1))
        await collect(engine, more)
        engine.close(batch)
        await collect(engine, await engine.submit(*ask(1, 1, 1)))

    run(scenario, most_open=3, seconds=0.002)


def test_a_closed_client_that_never_got_its_batch():
    async def scenario(engine, scripted):
        task = asyncio.ensure_future(engine.submit(*ask(100, 100)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.open == 0
        await idle(scripted)

    run(scenario, seconds=0.005)


def test_failure_reaches_every_open_request():
    async def scenario(engine, scripted):
        batches = [await engine.submit(*ask(100)) for _ in range(3)]

        async def ends(batch):
            with pytest.raises(EngineStopped) as raised:
                await until_the_end(batch)
            return str(raised.value)

        told = await asyncio.gather(*map(ends, batches))
        assert set(told) == {"the engine failed: RuntimeError: scripted to fail at step 4"}
        assert engine.trouble == told[0]
        with pytest.raises(EngineStopped, match="scripted to fail"):
            await engine.submit(*ask(1))

    run(scenario, fail_at=4, seconds=0.01)


def test_a_submission_while_the_engine_fails_is_answered():
    async def scenario(engine, scripted):
        scripted.submit = lambda request: 1 / 0
        with pytest.raises(EngineStopped, match="the engine failed: ZeroDivisionError"):
            await engine.submit(*ask(1))

    run(scenario)


def test_an_engine_that_cannot_be_made():
    async def main():
        engine = AsyncEngine(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await engine.start()

    asyncio.run(main())


def test_time_of_a_request():
    async def scenario(engine, scripted):
        batch = await engine.submit(*ask(100), seconds=0.05)
        with pytest.raises(RequestExpired, match=r"the answer took longer than 0\.05 seconds"):
            await until_the_end(batch)
        engine.close(batch)
        await idle(scripted)
        quick = await engine.submit(*ask(1), seconds=5.0)
        await collect(engine, quick)

    run(scenario, seconds=0.01)


def test_draining_waits_for_what_is_open():
    async def scenario(engine, scripted):
        reading = asyncio.ensure_future(collect(engine, await engine.submit(*ask(20))))
        assert await engine.drain(10.0)
        assert len((await reading)[0][0]) == 20
        with pytest.raises(EngineStopped, match="the server is shutting down"):
            await engine.submit(*ask(1))

    run(scenario, seconds=0.002)


def test_draining_does_not_wait_for_ever():
    async def scenario(engine, scripted):
        batch = await engine.submit(*ask(100))
        assert not await engine.drain(0.05)
        await engine.stop()
        with pytest.raises(EngineStopped, match="the server is shutting down"):
            await until_the_end(batch)

    run(scenario, seconds=0.01)


def test_a_step_that_takes_too_long_is_trouble():
    async def scenario(engine, scripted):
        assert engine.trouble is None
        batch = await engine.submit(*ask(1))
        while (trouble := engine.trouble) is None and scripted.has_work():
            await asyncio.sleep(0.01)
        assert trouble == "a step of the engine takes longer than 0.02 seconds"
        await collect(engine, batch)
        assert engine.trouble is None

    run(scenario, seconds=1.0, stall_seconds=0.02)


def test_open_has_to_allow_something():
    with pytest.raises(ValueError, match="most_open: expected at least 1, got 0"):
        AsyncEngine(lambda: None, most_open=0)
