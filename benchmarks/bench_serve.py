"""Tokens per second of the engine's modes on one model, and of `generate`, in turn in one process.

    python benchmarks/bench_serve.py                      # the pocket, two loops, ranks 0 and 64
    python benchmarks/bench_serve.py --model gemma2-300m  # 12 layers of a Gemma 2, random weights
    python benchmarks/bench_serve.py --width 4 16 --policies exact_lazy propagate --save
    python benchmarks/bench_serve.py --routing host device  # every subject by both
    python benchmarks/bench_serve.py --shortlist          # 8-bit codes of the head, in every mode
    python benchmarks/bench_serve.py --device cuda --dtype bf16 --model gemma2-300m --rank 0 \\
        --width 16 64 --routing host device --save

Every subject serves the same requests from a queue that is never empty, and is measured once it is
in its stride; exit depths are replayed, so that no model has to be good. `csb` is the same engine
refilled at full passes, where every token runs all loops: continuous sequence batching. Where
both routings are measured, all are set against the faster `csb`, and those of the device against
themselves on the host too. A subject whose tokens differ from those of requests served alone has no
time.

`bound` is (B t + h) / (E t + h), t and h the seconds of a row in a block and in the head of the csb
run: what exits can give where a row costs the same beside any others and fills cost nothing. On a
card times of blocks, heads and ticks are those that the host waits, which launches them; rates are
of whole windows.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gemma_ext.bench import report
from gemma_ext.bench.rows import verdict
from gemma_ext.bench.subject import DTYPES
from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.protocol import Request, SamplingParams

RESULTS = Path(__file__).parent / "results"
KEY = ("model", "dtype", "rank", "exits", "width", "head")
COLUMNS = {
    "name": ("served by", ""),
    "rate": ("tokens/s", ".1f"),
    "spread": ("spread", ".0%"),
    "x_csb": ("x csb", ".2f"),
    "x_csb_cpu": ("x csb, cpu time", ".2f"),
    "x_host": ("x host", ".2f"),
    "x_generate": ("x generate", ".2f"),
    "bound": ("bound", ".2f"),
    "tpot_p50": ("ms between tokens, p50", ".1f"),
    "tpot_p99": ("p99", ".1f"),
    "mean_rows": ("rows a block", ".1f"),
    "mean_loops": ("loops a block", ".2f"),
    "fills": ("fill rows", ".0%"),
    "mean_coda": ("rows a head", ".1f"),
    "block_ms": ("block ms", ".2f"),
    "head_ms": ("head ms", ".2f"),
    "tick_ms": ("tick ms", ".2f"),
    "own": ("outside the model", ".1%"),
    "note": ("note", ""),
}
DEVICE = ", device"
ORDER = [
    name + routed
    for name in (
        "csb", "cdb exact_lazy", "cdb exact_eager", "cdb propagate", "cdb copy", "cdb single",
        "lockstep exact_lazy", "engine", "generate",
    )
    for routed in ("", DEVICE)
]  # fmt: skip
LAYOUT = report.Layout(
    title="Serving",
    about="`python benchmarks/bench_serve.py --save`; columns are explained in `../../README.md`.",
    case=KEY,
    label=lambda row: (
        f"{row['model']} {row['dtype']}, rank {row['rank']}, exits {row['exits']}, "
        f"{row['width']} tokens a step{', head by codes' if row['head'] == 'codes' else ''}"
    ),
    columns=COLUMNS,
    place=ORDER.index,
)
LOOPS = 2
BARS = {0: 1.6, 64: 1.35}  # times csb, by rank, at exits 0.8,0.2
FULL = 0.97  # times csb where no token leaves
GENERATE = 2.0
PROMPT = 0.25  # of the output's tokens, as 512 of 2048 are
OUTPUT = {"gemma2-300m": (24, 40)}  # tokens of an output where they take long; elsewhere
MANY = (96, 160)
CHECKED = 24  # tokens of an output that is compared


def models(
    name: str, ranks: Sequence[int], dtype: torch.dtype, device: str
) -> Iterator[tuple[int, Any]]:
    """(rank, recursive model), and (None, the model that they are made of) first."""
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

    from gemma_ext import pocket
    from gemma_ext.papers.recursive import Recipe, convert

    if name.startswith("pocket"):
        base = pocket.load(name.partition(":")[2] or "small").model
    elif name == "gemma2-300m":
        torch.manual_seed(0)
        base = Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=16384, hidden_size=1280, intermediate_size=4864, num_hidden_layers=12,
                num_attention_heads=8, num_key_value_heads=4, head_dim=160,
                query_pre_attn_scalar=160, max_position_embeddings=2048,
            )
        )  # fmt: skip
    else:
        base = AutoModelForCausalLM.from_pretrained(name)
    base = base.to(dtype).eval()
    yield -1, base if device == "cpu" else copy.deepcopy(base).to(device)
    for rank in ranks:
        made = convert(base, Recipe(loops=LOOPS, init="average", rank=rank))
        yield rank, made.to(device, dtype).eval()


@dataclass
class Workload:
    """Requests without end, the same for every subject."""

    vocabulary: int
    exits: tuple[float, ...]
    output: tuple[int, int] = MANY
    shortlist: bool = False
    seed: int = 0

    @property
    def longest(self) -> int:
        return int((1 + PROMPT) * self.output[1])

    def requests(self) -> Iterator[tuple[Request, list[int]]]:
        draw = random.Random(self.seed)
        depths = range(1, len(self.exits) + 1)
        while True:
            length = int(PROMPT * draw.randint(*self.output))
            prompt = tuple(draw.choices(range(3, self.vocabulary), k=length))
            count = draw.randint(*self.output)
            params = SamplingParams(max_tokens=count, temperature=0.0)
            yield Request(prompt, params), draw.choices(depths, self.exits, k=count)


def workload_of(model: Any, exits: tuple[float, ...], options: argparse.Namespace) -> Workload:
    output = OUTPUT.get(options.model, MANY)
    return Workload(model.config.vocab_size, exits, output, options.shortlist)


class Timed:
    """A runner whose blocks and heads are timed, and the ticks of its router."""

    def __init__(self, runner: Any, router: Any) -> None:
        self._runner = runner
        self.seconds = {"block": 0.0, "coda": 0.0, "embed": 0.0, "tick": 0.0}
        for name in ("block", "coda", "embed"):
            setattr(self, name, self._timed(name, getattr(runner, name)))
        if router is not None:
            router.tick = self._landing(self._timed("tick", router.tick))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def _timed(self, name: str, call: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        return timed

    def _landing(self, tick: Any) -> Any:
        """A tick takes until somebody has waited for it."""

        def launched(*arguments: Any) -> Any:
            flight = tick(*arguments)
            flight.land = self._timed("tick", flight.land)
            return flight

        return launched


@dataclass
class Window:
    tokens: int
    seconds: float
    cpu: float


@dataclass
class Served:
    """An engine with a queue that is never empty; its clock runs while it is measured."""

    engine: Engine
    source: Iterator[tuple[Request, list[int]]]
    elapsed: float = 0.0
    began: float = 0.0
    windows: list[Window] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine.clock = lambda: self.elapsed + time.perf_counter() - self.began
        self.engine.runner = Timed(self.engine.runner, self.engine.router)

    def run(self, seconds: float = float("inf"), requests: float = float("inf")) -> Window:
        engine, tokens, ended = self.engine, 0, 0
        self.began, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - self.began < seconds and ended < requests:
            while engine.scheduler.queues()["waiting"] < engine.config.width:
                engine.submit(*next(self.source))
            for event in engine.step():
                tokens += event.token is not None
                ended += event.finish_reason is not None
        spent = time.perf_counter() - self.began
        self.elapsed += spent
        return Window(tokens, spent, time.process_time() - cpu)

    def warm(self) -> None:
        """Until twice the width of requests has ended; what was counted is forgotten."""
        engine = self.engine
        self.run(requests=2 * engine.config.width)
        engine.latencies.forget()
        self.counted, self.spent = engine.scheduler.counters(), dict(engine.runner.seconds)
        self.ticks = 0 if engine.router is None else engine.router.ticks

    def row(self) -> dict[str, Any]:
        now, spent = self.engine.scheduler.counters(), self.engine.runner.seconds
        delta = {name: now[name] - self.counted[name] for name in now}
        seconds = {name: spent[name] - self.spent[name] for name in spent}
        latency = self.engine.latencies.summary()
        total = sum(window.seconds for window in self.windows)
        if self.engine.router is None:
            times = {
                "block_ms": 1e3 * seconds["block"] / delta["blocks"],
                "head_ms": 1e3 * seconds["coda"] / delta["codas"],
            }
        else:
            times = {"tick_ms": 1e3 * seconds["tick"] / (self.engine.router.ticks - self.ticks)}
        return {
            **times,
            "tpot_p50": 1e3 * latency["tpot_p50"],
            "tpot_p99": 1e3 * latency["tpot_p99"],
            "mean_rows": delta["rows"] / delta["blocks"],
            "mean_loops": delta["distinct_loops"] / delta["blocks"],
            "fills": delta["fill_rows"] / delta["rows"],
            "mean_coda": delta["coda_rows"] / delta["codas"],
            "own": 1 - sum(seconds.values()) / total,
        }


@dataclass
class Generated:
    """`generate` over batches of what has arrived, padded on the left."""

    model: Any
    width: int
    source: Iterator[tuple[Request, list[int]]]
    windows: list[Window] = field(default_factory=list)

    def run(self, seconds: float = 0.0) -> Window:
        """Whole batches, one at least."""
        tokens, began, cpu = 0, time.perf_counter(), time.process_time()
        while True:
            batch = [request for request, _ in itertools.islice(self.source, self.width)]
            self.batch(batch)
            tokens += sum(request.params.max_tokens for request in batch)
            if time.perf_counter() - began >= seconds:
                break
        return Window(tokens, time.perf_counter() - began, time.process_time() - cpu)

    @torch.inference_mode()
    def batch(self, requests: list[Request]) -> list[list[int]]:
        longest = max(len(request.prompt) for request in requests)
        ids = torch.zeros(len(requests), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, request in enumerate(requests):
            ids[i, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[i, longest - len(request.prompt) :] = 1
        most = max(request.params.max_tokens for request in requests)
        ids, mask = (x.to(self.model.device) for x in (ids, mask))
        out = self.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=most, min_new_tokens=most,
            pad_token_id=0,
        )  # fmt: skip
        return [
            row[longest : longest + request.params.max_tokens].tolist()
            for row, request in zip(out, requests, strict=True)
        ]

    def warm(self) -> None:
        self.run()

    def row(self) -> dict[str, Any]:
        return {}


def engine_of(
    model: Any,
    workload: Workload,
    width: int,
    mode: str = "cdb",
    policy: str = "exact_lazy",
    routing: str = "host",
) -> Engine:
    config = EngineConfig(
        width=width,
        requests=3 * width,
        max_model_len=workload.longest,
        mode=mode,
        kv_policy=policy,
        min_coda_batch=width if mode == "cdb" else 1,
        prefill_tokens=256,
        routing=routing,
    )
    return Engine.of_model(model, config, shortlist=workload.shortlist)


def alone(
    model: Any, workload: Workload, policy: str, requests: Sequence[tuple[Request, list[int]]]
) -> list[list[int]]:
    """The tokens of each request with nothing beside it."""
    found = []
    for request, depths in requests:
        engine = engine_of(model, workload, 1, policy=policy)
        engine.submit(request, depths)
        found.append(_drain(engine)[1])
    return found


def _drain(engine: Engine) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    while engine.has_work():
        for event in engine.step():
            if event.token is not None:
                found.setdefault(event.request, []).append(event.token.id)
    return found


def few(workload: Workload, count: int) -> list[tuple[Request, list[int]]]:
    """The first requests, with outputs short enough to be drawn one after the other."""
    cut = []
    for request, depths in itertools.islice(workload.requests(), count):
        params = replace(request.params, max_tokens=min(CHECKED, request.params.max_tokens))
        cut.append((replace(request, params=params), depths))
    return cut


def red(model: Any, workload: Workload, width: int, mode: str, policy: str, routing: str) -> str:
    """A sentence where a full engine draws other tokens than one request after the other."""
    requests = few(workload, width + 2)
    engine = engine_of(model, workload, width, mode, policy, routing)
    ids = [engine.submit(*one) for one in requests]
    together, some = _drain(engine), (0, width + 1)
    if mode == "csb":
        requests = [(request, [LOOPS] * len(depths)) for request, depths in requests]
    expected = alone(model, workload, policy, [requests[i] for i in some])
    wrong = sum(together[ids[i]] != tokens for i, tokens in zip(some, expected, strict=True))
    return f"RED: {wrong} of {len(some)} outputs differ from those alone" if wrong else ""


def measure(subjects: dict[str, Any], seconds: float, rounds: int) -> None:
    """Windows in turn, A B C, C B A, ..."""
    for subject in subjects.values():
        subject.warm()
    for turn in range(rounds):
        order = list(subjects.values())
        for subject in order if turn % 2 == 0 else order[::-1]:
            subject.windows.append(subject.run(seconds))


def rate(subject: Any) -> float:
    """Median tokens per second of its windows."""
    return statistics.median(window.tokens / window.seconds for window in subject.windows)


def gain(subject: Any, base: Any, cost: str = "seconds") -> float:
    """Tokens for a cost, as a multiple of the base's in the same round."""
    pairs = zip(subject.windows, base.windows, strict=True)
    return statistics.median(
        a.tokens / getattr(a, cost) * getattr(b, cost) / b.tokens for a, b in pairs
    )


def rows_of(subjects: dict[str, Any], base: str, column: str) -> dict[str, dict[str, Any]]:
    """Rates, and ratios to `base`, by whichever routing is faster."""
    found = {}
    bases = [name for name in (base, base + DEVICE) if name in subjects]
    base = max(bases, key=lambda name: rate(subjects[name]), default=base)
    for name, subject in subjects.items():
        rates = [window.tokens / window.seconds for window in subject.windows]
        row = {"name": name, "rate": statistics.median(rates), **subject.row()}
        row["spread"] = (max(rates) - min(rates)) / row["rate"]
        host = name.removesuffix(DEVICE)
        if name != base and base in subjects:
            row[column] = gain(subject, subjects[base])
            if column == "x_csb":
                row["x_csb_cpu"] = gain(subject, subjects[base], "cpu")
        if name != host and host in subjects:
            row["x_host"] = gain(subject, subjects[host])
        found[name] = row
    return found


def recursive_case(
    model: Any, rank: int, exits: tuple[float, ...], width: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    workload = workload_of(model, exits, options)
    full = exits[-1] == 1
    modes = {"csb": ("csb", "exact_lazy")}
    policies = options.policies[:1] if full else options.policies
    modes |= {f"cdb {policy}": ("cdb", policy) for policy in policies}
    if not full:
        modes["lockstep exact_lazy"] = ("lockstep", "exact_lazy")
    kinds = {
        name + (DEVICE if routing == "device" else ""): (*kind, routing)
        for name, kind in modes.items()
        for routing in options.routing
    }
    notes = {name: red(model, workload, width, *kind) for name, kind in kinds.items()}
    subjects = {
        name: Served(engine_of(model, workload, width, *kind), workload.requests())
        for name, kind in kinds.items()
        if not notes[name]
    }
    measure(subjects, options.seconds, options.rounds)
    rows = rows_of(subjects, "csb", "x_csb")
    mean = sum((j + 1) * p for j, p in enumerate(exits))
    if base := rows.get("csb"):
        block, head = base["block_ms"] / base["mean_rows"], base["head_ms"] / base["mean_coda"]
    for name, row in rows.items():
        if base and not name.startswith("csb"):
            row["bound"] = (LOOPS * block + head) / (mean * block + head)
        bar = FULL if full else BARS.get(rank)
        if bar and name.startswith("cdb") and "x_csb" in row:
            row["bars"] = verdict(f"{row['x_csb']:.2f} x csb, {bar} asked,", row["x_csb"] >= bar)
    return [rows.get(name, {"name": name}) | {"note": note} for name, note in notes.items()]


def vanilla_case(model: Any, width: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    workload = workload_of(model, (1.0,), options)
    asked = few(workload, 4)
    ours = alone(model, workload, "exact_lazy", asked)
    theirs = [Generated(model, 1, iter(())).batch([request])[0] for request, _ in asked]
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    subjects: dict[str, Any] = {
        "engine" + (DEVICE if routing == "device" else ""): Served(
            engine_of(model, workload, width, routing=routing), workload.requests()
        )
        for routing in options.routing
    }
    names = list(subjects)
    subjects["generate"] = Generated(model, width, workload.requests())
    measure(subjects, options.seconds, options.rounds)
    rows = rows_of(subjects, "generate", "x_generate")
    for name in names:
        found = rows[name]["x_generate"]
        rows[name]["note"] = f"{same} of {len(asked)} outputs as generate's"
        rows[name]["bars"] = verdict(
            f"{found:.2f} x generate, {GENERATE} asked,", found >= GENERATE
        )
    return list(rows.values())


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = report.machine(options.device)
    print(report.header(facts), flush=True)
    failed = False
    made = models(options.model, options.rank, DTYPES[options.dtype], options.device)
    for rank, model in made:
        for width in options.width:
            mixes = [()] if rank < 0 else [(*[0.0] * (LOOPS - 1), 1.0), tuple(options.exits)]
            for exits in mixes:
                told = "-" if rank < 0 else ",".join(f"{p:g}" for p in exits)
                name, head = Path(options.model).name, "codes" if options.shortlist else "whole"
                values = (name, options.dtype, max(rank, 0), told, width, head)
                blank = {**dict(zip(KEY, values, strict=True)), **dict.fromkeys(COLUMNS)}
                if rank < 0:
                    found = vanilla_case(model, width, options)
                else:
                    found = recursive_case(model, rank, exits, width, options)
                rows = [{**blank, "bars": "", **row} for row in found]
                title = LAYOUT.label(rows[0])
                print(f"\n## {title}\n{report.table_and_bars(rows, COLUMNS)}", flush=True)
                failed |= any("RED" in (row["note"] or "") for row in rows)
                if options.save:
                    report.save(RESULTS / facts["device"], "serve", rows, facts, LAYOUT)
    raise SystemExit(int(failed))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="pocket", help="pocket, pocket:nano, gemma2-300m, folder"
    )
    parser.add_argument("--rank", nargs="+", type=int, default=list(BARS), help="of depth LoRAs")
    parser.add_argument("--exits", nargs=LOOPS, type=float, default=[0.8, 0.2])
    parser.add_argument("--width", nargs="+", type=int, default=[4, 16], help="tokens in a step")
    parser.add_argument("--policies", nargs="+", default=["exact_lazy", "propagate"])
    parser.add_argument("--routing", nargs="+", choices=("host", "device"), default=["host"])
    parser.add_argument("--shortlist", action="store_true", help="heads by 8-bit codes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a window")
    parser.add_argument("--rounds", type=int, default=5, help="windows of each subject")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<device>/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
