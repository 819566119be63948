"""The engine's own scheduler on a machine whose steps take the seconds that a formula says.

Source: arXiv 2410.20672 section 3.8 (exits, times per token), and a roofline: a step takes the
longer of its bytes over the bandwidth and its FLOPs over the peak.

    tau         seconds of a block for W tokens, E = sum_j j p_j the mean exit
    cdb         W / (E tau) tokens per second
    csb         W / (B tau)
    lockstep    W / (tau sum_j (1 - F(j)^W)), F(j) the share of exits at or before loop j, F(0) = 0:
                a pass takes as long as its deepest token
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gemma_ext.serve.config import PAGE, EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.runner import FILL, PROMPT, Rows
from gemma_ext.serve.sampling import Sampled

Cost = Callable[[Rows], float]


@dataclass(frozen=True)
class Machine:
    """A card: bytes per second of its memory, and dense bfloat16 FLOPs per second."""

    bandwidth: float
    peak: float


A100 = Machine(1.555e12, 312e12)
H100 = Machine(3.35e12, 989e12)
H200 = Machine(4.8e12, 989e12)


@dataclass(frozen=True)
class Shape:
    """A recursive model in numbers, two bytes each.

    Attributes:
        block: parameters of a block, K layers.
        head: of the head, V D.
        adapters: of the depth LoRA of one loop.
        kv: bytes of the keys and values of a token in one loop.
    """

    block: float
    head: float
    adapters: float = 0.0
    kv: float = 0.0


def gemma_2b(loops: int, rank: int = 0) -> Shape:
    """Gemma 1 2B, 18 layers of D 2048, MLP 16384, one KV head of 256, V 256000."""
    width, inner, heads, dim = 2048, 16384, 8, 256
    matrices = [(width, heads * dim), (width, dim), (width, dim), (heads * dim, width)]
    matrices += [(width, inner), (width, inner), (inner, width)]
    layers = 18 // loops
    return Shape(
        block=layers * sum(a * b for a, b in matrices),
        head=256000 * width,
        adapters=layers * sum(rank * (a + b) for a, b in matrices),
        kv=layers * 2 * dim * 2,
    )


def roofline(shape: Shape, machine: Machine) -> tuple[Cost, Callable[[int], float]]:
    """Seconds of a block and of the head for n rows; one read of a request's keys at each loop."""

    def block(rows: Rows) -> float:
        n, present = len(rows.slot), int((rows.seg_offsets.diff() > 0).sum())
        moved = 2 * (shape.block + present * shape.adapters)
        _, group = (rows.req.long() * 256 + rows.loop).unique(return_inverse=True)
        keys = torch.zeros(n, dtype=torch.int64).scatter_reduce(
            0, group, rows.pos.long() + 1, "amax"
        )
        moved += shape.kv * float(keys.sum())
        return max(moved / machine.bandwidth, 2 * n * (shape.block + shape.adapters) / machine.peak)

    def head(n: int) -> float:
        return max(2 * shape.head / machine.bandwidth, 2 * n * shape.head / machine.peak)

    return block, head


def fixed(seconds: float, head: float = 0.0) -> tuple[Cost, Callable[[int], float]]:
    """A block that takes the same time however full it is; prompts and fills alone take none."""

    def block(rows: Rows) -> float:
        return seconds if bool((rows.kind == 0).any()) else 0.0

    return block, lambda n: head


class SimulatedRunner:
    """Draws token 0 and moves a clock.

    Attributes:
        now: seconds.
    """

    vocabulary = 2

    def __init__(
        self, loops: int, block: Cost, head: Callable[[int], float], *, prompts: bool, fills: bool
    ) -> None:
        self.loops, self.now, self.busy = loops, 0.0, 0.0
        self._block, self._head, self._free = block, head, set()
        if not prompts:
            self._free.add(PROMPT)
        if not fills:
            self._free.add(FILL)

    def open(self, row: int, request: Request, drawn: int = 0) -> None:
        """Nothing is kept."""

    def close(self, row: int) -> None:
        """Nothing is kept."""

    def embed(self, slots: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Takes no time."""

    def block(self, rows: Rows) -> None:
        for kind in self._free:
            rows = _without(rows, kind)
        if len(rows.slot):
            self._spend(self._block(rows))

    def coda(self, slots: torch.Tensor, *rest: torch.Tensor) -> Sampled:
        self._spend(self._head(len(slots)))
        return Sampled(torch.zeros(len(slots), dtype=torch.int32), None, None, None)

    def _spend(self, seconds: float) -> None:
        self.now += seconds
        self.busy += seconds


def _without(rows: Rows, kind: int) -> Rows:
    keep = rows.kind != kind
    if bool(keep.all()):
        return rows
    counts = torch.tensor(
        [int(keep[a:b].sum()) for a, b in zip(rows.seg_offsets, rows.seg_offsets[1:], strict=False)]
    )
    segments = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    fields = {name: getattr(rows, name)[keep] for name in ("slot", "pos", "req", "loop", "kind")}
    return rows._replace(**fields, seg_offsets=segments)


@dataclass(frozen=True)
class Workload:
    """Requests of a simulation.

    Attributes:
        exits: share of tokens that leave after loop 1, 2, ..., B.
        requests: how many.
        prompt, output: tokens of each; `output` may be one number for each request.
        rate: requests per second, Poisson; None for all at once.
        seed: of arrivals and exits.
    """

    exits: tuple[float, ...]
    requests: int = 300
    prompt: int = 16
    output: int | tuple[int, ...] = 64
    rate: float | None = None
    seed: int = 0

    @property
    def mean_exit(self) -> float:
        return sum((j + 1) * p for j, p in enumerate(self.exits))


def simulate(
    workload: Workload,
    config: EngineConfig,
    block: Cost,
    head: Callable[[int], float],
    *,
    prompts: bool = True,
    fills: bool = True,
) -> dict[str, Any]:
    """Runs a workload to its end.

    Args:
        prompts, fills: whether their rows take time.

    Returns:
        tokens_per_second behind each request's first token, over the time from the first step to
        the last; busy share; both NaN where no time passes; quantiles of `Latencies.summary`;
        counters of the scheduler.
    """
    loops, rng = len(workload.exits), np.random.default_rng(workload.seed)
    runner = SimulatedRunner(loops, block, head, prompts=prompts, fills=fills)
    engine = Engine(runner, config, clock=lambda: runner.now)
    count = workload.requests
    outputs = np.broadcast_to(np.asarray(workload.output), count)
    gaps = np.zeros(count) if workload.rate is None else rng.exponential(1 / workload.rate, count)
    arrivals, sent = np.cumsum(gaps), 0
    while sent < count or engine.has_work():
        if not engine.has_work():
            runner.now = max(runner.now, arrivals[sent])
        while sent < count and arrivals[sent] <= runner.now:
            depths = rng.choice(loops, size=int(outputs[sent]), p=workload.exits) + 1
            params = SamplingParams(max_tokens=int(outputs[sent]), temperature=0.0)
            engine.submit(Request((0,) * workload.prompt, params), depths.tolist())
            sent += 1
        engine.step()
    counted, seconds = engine.scheduler.counters(), runner.now or math.nan
    return {
        "tokens_per_second": (counted["outputs"] - count) / seconds,
        "busy": runner.busy / seconds,
        **engine.latencies.summary(),
        **counted,
    }


def config_for(
    workload: Workload, width: int, *, mode: str = "cdb", **options: Any
) -> EngineConfig:
    """An engine with room for the workload and three times its width of requests."""
    length = workload.prompt + int(np.max(workload.output))
    given = {"requests": 3 * width, "prefill_tokens": 16 * width, "kv_policy": "propagate"}
    return EngineConfig(
        width=width, max_model_len=PAGE * math.ceil(length / PAGE), mode=mode,
        **{**given, **options},
    )  # fmt: skip


def paper_speedups(
    workload: Workload, width: int, seconds: float = 1.0, modes: Sequence[str] = ("cdb", "lockstep")
) -> dict[str, float]:
    """Tokens per second over those of csb as the paper counts: time of blocks alone.

    Example:
        >>> paper_speedups(Workload((0.8, 0.2), requests=3000), 43)  # 2 / 1.2 at best
    """
    free = {"prompts": False, "fills": False}

    def rate(mode: str) -> float:
        config = config_for(workload, width, mode=mode)
        return simulate(workload, config, *fixed(seconds), **free)["tokens_per_second"]

    base = rate("csb")
    return {mode: rate(mode) / base for mode in modes}


def ladder(
    workload: Workload, width: int, loops: int, machine: Machine, *, rank: int = 0
) -> list[tuple[str, float]]:
    """What is left of the exits' gain over csb as each cost that the paper leaves out comes back.

    Returns:
        (what is counted from here on, speedup), from the paper's own count to all of it at
        80 percent of the load that csb can take, where the speedup is that of the median time
        between a request's submission and its end, per token.

    Raises:
        ValueError: outputs of one token, which no exit makes faster.
    """
    per_request = float(np.mean(workload.output)) - 1
    if per_request <= 0:
        raise ValueError(f"output: expected more than one token, got {workload.output}")
    block, head = roofline(gemma_2b(loops, rank), machine)
    plain = (block, lambda n: 0.0)
    bare = roofline(replace(gemma_2b(loops, rank), adapters=0.0), machine)[0], plain[1]
    lazy = {"kv_policy": "exact_lazy"}

    def speedup(costs: tuple, counted: dict[str, bool], **options: Any) -> float:
        of = {"prompts": False, "fills": False, **counted}
        runs = [
            simulate(workload, config_for(workload, width, mode=mode, **options), *costs, **of)
            for mode in ("cdb", "csb")
        ]
        return runs[0]["tokens_per_second"] / runs[1]["tokens_per_second"]

    wide, full = {"min_coda_batch": width}, (block, head)
    exact = {**wide, "kv_policy": "exact_lazy"}
    rungs = [("blocks alone, as the paper counts", speedup(bare, {}))]
    if rank:
        rungs.append((f"depth LoRA of rank {rank}", speedup(plain, {})))
    rungs += [
        ("head after every step", speedup(full, {})),
        (f"head for {width} tokens at a time", speedup(full, {}, **wide)),
        ("keys and values of skipped loops", speedup(full, {"fills": True}, **exact)),
        ("prompts", speedup(full, {"fills": True, "prompts": True}, **exact)),
    ]
    csb = simulate(workload, config_for(workload, width, mode="csb", **lazy), block, head)
    arriving = replace(workload, rate=0.8 * csb["tokens_per_second"] / per_request)
    slow, fast = (
        simulate(arriving, config_for(arriving, width, mode=mode, **lazy), block, head)
        for mode in ("csb", "cdb")
    )
    gain = slow["norm_latency_p50"] / fast["norm_latency_p50"]
    rungs.append(("time per token at 80 % of csb's load", gain))
    return rungs
