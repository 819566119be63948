"""The loop between a scheduler, which knows rows, and a runner, which knows tensors.

    plan    which rows at which loops, or which tokens to the head        (C++, no torch)
    run     one block, or the head                                        (the runner)
    report  exits and tokens                                              (C++)

A step never waits for another request's: tokens of all depths share a block, and a token that has
left is replaced in the next one. Where the device routes (`gemma_ext.serve.router`), a plan is a
prompt's loop or a tick, and what a tick drew is reported when the next one is under way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemma_ext.serve.config import PAGE, EngineConfig
from gemma_ext.serve.flight import Flight
from gemma_ext.serve.kv import HostStore
from gemma_ext.serve.outputs import REASONS, Outputs
from gemma_ext.serve.protocol import Event, Limits, Request, Stats
from gemma_ext.serve.router import Router
from gemma_ext.serve.runner import PROMPT, ModelRunner, Rows
from gemma_ext.serve.stats import Latencies
from gemma_ext.serve.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gemma_ext.serve.exits import ExitTest
    from gemma_ext.serve.sampling import Sampled

_NO_PAGE = "the KV pool has no page left for this request"


class Engine:
    """Draws tokens for many requests at a time, at mixed depth.

    Args:
        runner: of the model; its sizes are those of `config`.
        config: widths and policies.
        trace: gets a line for every step.
        clock: seconds, from any start.
        revision: of the model, for keys of the prefix cache.

    The first token of an output is read after all the loops that its request may run: a prompt is
    computed as one. The exit test decides for the tokens behind it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        *,
        trace: Trace | None = None,
        clock: Callable[[], float] = time.perf_counter,
        revision: str = "",
    ) -> None:
        self.runner, self.config, self.trace, self.clock = runner, config, trace, clock
        self.prefix = getattr(runner, "prefix", 0)  # places in front of every prompt
        longest = min(config.max_model_len, PAGE * config.pages - self.prefix)
        if longest < 1:
            raise ValueError(
                f"pages: expected room for a token behind a prefix of {self.prefix}, "
                f"got {config.pages}"
            )
        self.limits = Limits(runner.vocabulary, runner.loops, longest)
        self.router: Router | None = None
        if config.routing == "device":
            self.router = Router(runner, config.shape(runner.loops, self.prefix))
        self._flight: Flight | None = None
        self.scheduler = config.scheduler(runner.loops, revision, self.prefix)
        self.open = Outputs(lambda: self.clock())
        self.store = HostStore(runner)
        self._refused: list[int] = []
        memory = self.scheduler.buffers()
        self._seen = {name: memory[name] for name in ("id", "depth", "output", "end", "exits")}
        self._tensors = {
            name: torch.from_numpy(memory[name])
            for name in (
                "slot", "pos", "row", "loop", "kind", "token", "depth", "seg_offsets",
                "block_tables", "limits",
            )
        }  # fmt: skip
        self._run = {
            "block": self._block,
            "coda": self._coda,
            "score": self._score,
            "offload": self._offload,
            "restore": self._restore,
            "tick": self._tick,
            "idle": lambda n: self._land(),
        }

    @classmethod
    def of_model(
        cls,
        model: PreTrainedModel,
        config: EngineConfig,
        *,
        exits: ExitTest | None = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
        shortlist: bool = False,
        **options: Any,
    ) -> Engine:
        """An engine for a causal LM of transformers, vanilla or recursive.

        Args:
            exits: the exit test; none by default.
            dtype: of weights, keys and values; the model's by default.
            impl: of the ops.
            shortlist: read codes of the head for greedy requests (`gemma_ext.serve.readout.Head`).
            options: of the engine.
        """
        from gemma_ext.serve.weights import read_weights

        weights = read_weights(model, dtype=dtype)
        config = config.routed(weights.device.type == "cuda")
        runner = ModelRunner(
            weights,
            config.sizes,
            policy=config.kv_policy,
            keep=config.keep,
            exits=exits,
            impl=impl,
            shortlist=shortlist,
            drafts=config.drafts > 0,
        )
        return cls(runner, config, **options)

    def submit(self, request: Request, exit_depths: Sequence[int] | None = None) -> int:
        """Queues a request.

        Args:
            exit_depths: loops, from 1, after which each token of the output is read, in the place
                of the exit test; the first one has no effect.

        Raises:
            ValueError: no engine of these limits can answer it.
        """
        request.check(self.limits)
        params = request.params
        id = self.scheduler.submit(
            np.asarray((0,) * self.prefix + request.prompt, np.int32),
            max_tokens=params.max_tokens,
            min_loops=params.min_loops,
            max_loops=params.max_loops or self.limits.loops,
            score=request.prompt_logprobs is not None,
            stops=list(params.stop_ids),
            depths=list(exit_depths or ()),
        )
        self.open.add(id, request, exit_depths or ())
        return id

    def cancel(self, request: int) -> None:
        self.scheduler.cancel(request)
        self.open.drop(request)
        self.store.forget(request)

    @property
    def latencies(self) -> Latencies:
        """Of requests and tokens, by the engine's clock."""
        return self.open.latencies

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def step(self) -> list[Event]:
        stage, n = self.scheduler.plan()
        events = self._take_news()
        self._hand_over()
        if self.trace is None:
            events += self._run[stage](n)
        else:
            begin = self.clock()
            events += self.trace.step(self, stage, n, begin, lambda: self._run[stage](n))
        self._hand_over()
        for id in self._refused:  # a plan that is not reported yet may have rows of it
            self.scheduler.cancel(id)
        self._refused.clear()
        return events

    def stats(self) -> Stats:
        counted, queues = self.scheduler.counters(), self.scheduler.queues()
        return Stats(
            waiting=queues["waiting"],
            running=len(self.open) - queues["waiting"],
            pages=self.config.pages,
            free_pages=self.scheduler.free_pages,
            steps=counted["blocks"],
            rows=counted["rows"],
            prompt_tokens=counted["prompt_tokens"],
            output_tokens=counted["outputs"],
            cached_tokens=counted["cached_tokens"],
            fill_rows=counted["fill_rows"],
            preemptions=counted["preemptions"] + counted["offloads"],
            exits=tuple(self._seen["exits"].tolist()),
        )

    def _take_news(self) -> list[Event]:
        closed, opened, ended = self.scheduler.news()
        for row in closed:
            self.runner.close(row)
        events = []
        for id, row in opened:
            try:
                self.runner.open(row, self.open[id].request, self.open[id].drawn)
            except Exception as error:
                logging.getLogger(__name__).exception("a request could not begin")
                self._refused.append(id)
                sentence = f"the request could not begin: {type(error).__name__}: {error}"
                events.append(self._end(id, "error", sentence))
        for id, how in ended:
            if id in self.open:
                reason = REASONS[how]
                events.append(self._end(id, reason, _NO_PAGE if reason == "error" else None))
        return events

    def _end(self, id: int, reason: str, error: str | None) -> Event:
        self.store.forget(id)
        return self.open.end(id, reason, error)

    def _told(self, ids: list[int], depths: list[int], sampled: Sampled) -> list[Event]:
        """The events of tokens that have been reported."""
        n = len(ids)
        ends, outputs = (self._seen[name][:n].tolist() for name in ("end", "output"))
        events = self.open.tell(ids, depths, outputs, ends, sampled)
        for event in events:
            if event.finish_reason:
                self.store.forget(event.request)
        return events

    def _first(self, n: int, *names: str) -> list[torch.Tensor]:
        """Columns of the plan; the scheduler's positions count the prefix."""
        found = {name: self._tensors[name][:n] for name in names}
        if self.prefix and "pos" in found:
            found["pos"] = found["pos"] - self.prefix
        return list(found.values())

    def _block(self, n: int) -> list[Event]:
        segments, tables = self._tensors["seg_offsets"], self._tensors["block_tables"]
        slot, pos, row, loop, kind, token = self._first(
            n, "slot", "pos", "row", "loop", "kind", "token"
        )
        new = int(segments[1])
        if self.prefix:
            begins = (kind == PROMPT) & (loop == 0) & (pos == 0)
            self.runner.write_prefix(row[begins].long(), tables)
        if new:
            self.runner.embed(slot[:new], token[:new], pos[:new])
        exits = self.runner.block(Rows(slot, pos, row, loop, segments, kind, tables))
        self.scheduler.report_block(None if exits is None else exits.numpy())
        return []

    def _coda(self, n: int) -> list[Event]:
        slot, row, pos, depth = self._first(n, "slot", "row", "pos", "depth")
        sampled = self.runner.coda(slot, row, pos, depth, self._tensors["block_tables"])
        ids = self._seen["id"][:n].tolist()
        self.scheduler.report_coda(sampled.ids.numpy())
        return self._told(ids, self._seen["depth"][:n].tolist(), sampled)

    def _hand_over(self) -> None:
        """Requests that the scheduler gives to the device, and rows that it takes back."""
        if self.router is None:
            return
        stopped, started = self.scheduler.handed()
        for row in stopped:
            self.router.stop(row)
        for id, row, pos, slot in started:
            if id in self.open:  # else refused
                output, pos = self.open[id], pos - self.prefix
                drawn = len(output.drawn)
                self.router.start(row, id, output.request, pos, slot, drawn, output.depths)

    def _tick(self, n: int) -> list[Event]:
        before = self._flight
        tables, limits = self._tensors["block_tables"], self._tensors["limits"]
        self._flight = self.router.tick(tables, limits, n)
        self.scheduler.report_launched()
        return self._heard(before)

    def _land(self) -> list[Event]:
        before, self._flight = self._flight, None
        return self._heard(before)

    def _heard(self, flight: Flight | None) -> list[Event]:
        if flight is None:
            return []
        news = flight.land()
        self.router.queues = news.queues
        parked = news.parked[[id in self.open for id in news.parked[:, 0].tolist()]]
        events = self._report(news.drawn, news.sampled, news.ran)
        if len(parked):
            sampled = self.router.draw(parked)
            parked[:, 3] = sampled.ids.numpy()
            events += self._report(parked, sampled, (0, 0, 0, 0))
        self.scheduler.report_filled(news.filled)
        return events

    def _report(self, drawn: np.ndarray, sampled: Sampled, ran: tuple[int, ...]) -> list[Event]:
        """Tokens of a tick: rows of `News.drawn`."""
        told = drawn[:, [0, 3, 4, 5]]
        told[:, 3] += self.prefix
        self.scheduler.report_drawn(told, ran)
        return self._told(drawn[:, 0].tolist(), drawn[:, 4].tolist(), sampled)

    def _score(self, n: int) -> list[Event]:
        if n:
            id = int(self._seen["id"][0])
            asked = self.open[id].request.prompt_logprobs
            slot, row, pos, token = self._first(n, "slot", "row", "pos", "token")
            scored = self.runner.score(slot, row, pos, token, asked)
            self.open.score(id, token.tolist(), scored, asked)
        self.scheduler.report_score()
        return []

    def _offload(self, n: int) -> list[Event]:
        self.store.save(*self.scheduler.moved())
        self.scheduler.report_moved()
        return []

    def _restore(self, n: int) -> list[Event]:
        self.store.load(*self.scheduler.moved())
        self.scheduler.report_moved()
        return []
