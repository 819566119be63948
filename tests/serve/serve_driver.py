"""A scheduler in a few lines: random batches, exact lazy fills, one request beside the others."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from gemma_ext.serve.policies import EXACT
from gemma_ext.serve.protocol import Request
from gemma_ext.serve.runner import CURRENT, FILL, PROMPT, ModelRunner, Rows

PAGE = 16


def int32(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


@dataclass
class Item:
    pos: int
    slot: int
    loop: int = 0


@dataclass
class Job:
    request: Request
    row: int
    tokens: list[int]
    depths: list[int] = field(default_factory=list)
    sampled: list = field(default_factory=list)
    current: Item | None = None
    waits: bool = False  # for the coda
    deferred: list[Item] = field(default_factory=list)

    @property
    def done(self) -> bool:
        drawn = self.tokens[len(self.request.prompt) :]
        params = self.request.params
        return len(drawn) == params.max_tokens or bool(drawn and drawn[-1] in params.stop_ids)


class Driver:
    """Serves requests on a runner; `seed` decides what runs beside what."""

    def __init__(
        self, runner: ModelRunner, seed: int = 0, depths=None, whole_prompts: bool = False
    ) -> None:
        self.runner, self.random, self.depths = runner, random.Random(seed), depths
        self.whole_prompts = whole_prompts
        sizes = runner.sizes
        self.free = list(range(sizes.slots))
        pages = list(range(sizes.pages))
        self.random.shuffle(pages)
        self.pages = pages
        self.tables = torch.full((sizes.requests, -(-sizes.max_length // PAGE)), -1).int()

    def run(self, requests: list[Request]) -> list[Job]:
        jobs = [self.admit(row, request) for row, request in enumerate(requests)]
        while live := [job for job in jobs if not job.done]:
            waiting = [job for job in live if job.waits]
            ready = [job for job in live if not job.waits]
            if waiting and (not ready or self.random.random() < 0.4):
                self.coda(self.some(waiting))
            else:
                self.block(self.some(ready))
        return jobs

    def some(self, jobs: list[Job]) -> list[Job]:
        return self.random.sample(jobs, self.random.randint(1, len(jobs)))

    def admit(self, row: int, request: Request) -> Job:
        job = Job(request, row, list(request.prompt))
        count = -(-(len(request.prompt) + request.params.max_tokens) // PAGE)
        taken = [self.pages.pop() for _ in range(count)]
        self.tables[row, :count] = int32(taken)
        self.runner.open(row, request)
        begin, end = 0, len(job.tokens)
        if self.whole_prompts:
            self.prefill(job, 0, end)
            return job
        while begin < end:
            size = self.random.randint(1, end - begin)
            self.prefill(job, begin, begin + size)
            begin += size
        return job

    def prefill(self, job: Job, begin: int, end: int) -> None:
        items = [Item(pos, self.free.pop()) for pos in range(begin, end)]
        self.embed(job, items)
        most = min(job.request.params.max_loops or self.runner.loops, self.runner.loops)
        for _ in range(most):
            self.launch([(job, item, PROMPT) for item in items])
        if end == len(job.tokens):
            job.current, job.waits = items.pop(), True
        self.free += [item.slot for item in items]

    def begin(self, job: Job) -> None:
        job.current = Item(len(job.tokens) - 1, self.free.pop())
        self.embed(job, [job.current])

    def embed(self, job: Job, items: list[Item]) -> None:
        slots, positions = int32(item.slot for item in items), int32(item.pos for item in items)
        self.runner.embed(slots, int32(job.tokens[item.pos] for item in items), positions)

    def launch(self, rows: list[tuple[Job, Item, int]]) -> torch.Tensor | None:
        rows.sort(key=lambda row: row[1].loop)
        loops = [item.loop for _, item, _ in rows]
        signals = self.runner.block(
            Rows(
                int32(item.slot for _, item, _ in rows),
                int32(item.pos for _, item, _ in rows),
                int32(job.row for job, _, _ in rows),
                int32(loops),
                int32(sum(loop < j for loop in loops) for j in range(self.runner.loops + 1)),
                int32(kind for _, _, kind in rows),
                self.tables,
            )
        )
        for _, item, _ in rows:
            item.loop += 1
        return signals

    def block(self, jobs: list[Job]) -> None:
        rows = []
        for job in jobs:
            due = [i for i in job.deferred if i.loop == job.current.loop]
            rows += [(job, item, FILL) for item in due]
            rows.append((job, job.current, CURRENT))
        signals = self.launch(rows)
        for place, (job, item, kind) in enumerate(rows):
            if kind == CURRENT:
                passed = signals is not None and bool(signals[place])
                job.waits = self.leaves(job, item, passed)
        for job in jobs:
            self.drop_filled(job)

    def leaves(self, job: Job, item: Item, passed: bool) -> bool:
        params, loops = job.request.params, self.runner.loops
        most = min(params.max_loops or loops, loops)
        if self.depths is not None:
            return item.loop == self.depths[job.row][len(job.depths)]
        return item.loop == most or (passed and item.loop >= params.min_loops)

    def drop_filled(self, job: Job) -> None:
        for item in [item for item in job.deferred if item.loop == self.runner.loops]:
            job.deferred.remove(item)
            self.free.append(item.slot)

    def coda(self, jobs: list[Job]) -> None:
        items = [job.current for job in jobs]
        sampled = self.runner.coda(
            int32(item.slot for item in items),
            int32(job.row for job in jobs),
            int32(item.pos for item in items),
            int32(item.loop for item in items),
            self.tables,
        )
        for place, job in enumerate(jobs):
            item, job.waits = job.current, False
            job.depths.append(item.loop)
            job.tokens.append(int(sampled.ids[place]))
            job.sampled.append((sampled, place))
            if item.loop < self.runner.loops and self.runner.policy in EXACT:
                job.deferred.append(item)
            else:
                self.free.append(item.slot)
            if not job.done:
                self.begin(job)

    def fill(self, job: Job) -> None:
        """Runs all loops of every token that left early."""
        while job.deferred:
            first = min(item.loop for item in job.deferred)
            self.launch([(job, item, FILL) for item in job.deferred if item.loop == first])
            self.drop_filled(job)


def keys(driver: Driver, row: int, count: int) -> torch.Tensor:
    """[L, 2, heads, count, hd] of the first tokens of a request."""
    pages = driver.tables[row, : -(-count // PAGE)].long()
    held = driver.runner.kv_pool[:, pages]  # [L, pages, 2, heads, 16, hd]
    return held.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)[:, :, :, :count]
