"""Loss of an LM head, forward and backward: gemma_ext against its peers, in one run.

    python benchmarks/bench_cce.py --shape 512,2304,32768 --dtype bf16 --data plaw-2.5
    python benchmarks/bench_cce.py --impl eager cce exact --csv out/cce.csv --save

Every subject is first checked in a process of its own against the exact float32 loss and gradients
of the unrounded inputs (sampled, see ``gemma_ext.bench.truth``), which also measures its peak
memory; one that fails prints no time. The others are then timed in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma_ext.bench import report, timing
from gemma_ext.bench.data import DATA_KINDS
from gemma_ext.bench.subject import DTYPES, Case, Subject

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SHAPES = tuple((n, 2304, v) for v in (32768, 256000) for n in (512, 2048, 8192))
SPEED_BARS = {  # least ratio to eager, forward and backward
    ("filtered", "bf16"): 3.2,
    ("filtered", "fp32"): 2.0,
    ("exact", "bf16"): 1.5,
    ("exact", "fp32"): 1.05,
}
MEMORY_BAR = 0.05  # of the fp32 logits, filtered subjects
ERROR_SLACK = 1.01  # where rounding the inputs is the whole error, equal codes differ by less
LOSS_LIMIT = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
EXACT_FP32_LIMIT = 5e-5  # relative error of the gradients
# Peers: wrong code is far above, rounding below. In fp32 torch's log-softmax adds V terms in fp32.
PEER_LIMIT = {"fp32": 1e-3, "bf16": 1e-1, "fp16": 1e-1}
ORDER = (
    "eager",
    "compile",
    "chunked",
    "torch-lce",
    "exact",
    "cce",
    "cce+state",
    "auto",
    "reference",
)
RATIOS = ("eager", "compile", "chunked", "torch-lce")
KEY = ("n", "v", "d", "dtype", "data", "name")
COLUMNS = {
    "name": ("impl", ""),
    "forward": ("fwd s", ".3f"),
    "total": ("fwd+bwd s", ".3f"),
    "spread": ("spread", ".0%"),
    "gflops": ("GFLOP/s", ".0f"),
    "of_ceiling": ("of GEMM", ".0%"),
    "peak_mb": ("peak MB", ".0f"),
    "extra_mb": ("less grads", ".0f"),
    "of_logits": ("of logits", ".1%"),
    **{f"x_{peer}": (f"x {peer}", ".2f") for peer in RATIOS},
    "x_eager_cpu": ("x eager, cpu time", ".2f"),
    "kept": ("kept", ".3f"),
    "dropped": ("dropped", ".4f"),
    "de_error": ("dE err", ".1e"),
    "dc_error": ("dC err", ".1e"),
    "note": ("note", ""),
}


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float
    rounds: int
    check_only: bool
    warmup: int


def main() -> None:
    options = parse_options()
    # A terminated run unwinds: its stage is killed and its data folder removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import cce_stages  # the environment above has to be set before any stage starts

    known = cce_stages.subjects()
    unknown = set(options.impl) - set(known)
    if unknown:
        raise SystemExit(f"--impl: expected some of {', '.join(known)}, got {sorted(unknown)}")
    chosen = [known[name] for name in sorted(options.impl or default_subjects(known), key=place)]
    effort = Effort(options.seconds, options.rounds, options.check, options.warmup)
    facts = report.machine()
    print(report.header(facts), flush=True)
    for shape in options.shape:
        for kind in options.data:
            for rows in run_shape(shape, kind, options.dtype, chosen, effort, options.threads):
                if options.csv:
                    report.append_csv(options.csv, rows)
                if options.save:
                    save(rows, facts)


def run_shape(
    shape: tuple[int, int, int],
    kind: str,
    dtypes: Sequence[str],
    chosen: Sequence[Subject],
    effort: Effort,
    threads: int,
) -> Iterator[list[dict[str, Any]]]:
    """All subjects on one shape and kind of data; prints a table and yields its rows per dtype."""
    uncapped = any(not subject.capped for subject in chosen)
    with tempfile.TemporaryDirectory(prefix="bench_cce_") as name:
        folder = Path(name)
        case = Case(*shape, dtypes[0], kind, threads=threads)
        stage("prepare", folder, {"case": case.as_dict(), "uncapped": uncapped})
        yardstick = json.loads((folder / "yardstick.json").read_text())
        for dtype in dtypes:
            case = Case(*shape, dtype, kind, threads=threads)
            yield run_case(folder, case, chosen, yardstick, effort)


def run_case(
    folder: Path,
    case: Case,
    chosen: Sequence[Subject],
    yardstick: Mapping[str, float],
    effort: Effort,
) -> list[dict[str, Any]]:
    """Check every subject, time the green ones, print the table."""
    print(f"\n## {case.label()}", flush=True)
    rows = {s.name: {**blank_row(case), "name": s.name} for s in chosen}
    green = []
    for subject in chosen:
        row = rows[subject.name]
        reason = subject.refuse(case)
        if reason is None:
            result, reason = checked(folder, case, subject.name)
        if reason is None:
            row |= check_columns(case, result)
            reason = red(case, subject, result, yardstick)
        if reason is not None:
            row["note"] = reason
            continue
        row["note"] = "" if subject.capped else "no softcap: another loss, run uncapped"
        green.append(subject)
    if green and not effort.check_only:
        job = {
            "case": case.as_dict(),
            "names": [s.name for s in green],
            "timing": {
                "seconds": effort.seconds,
                "least": effort.rounds,
                "warmup": effort.warmup,
            },
        }
        timed = stage("time", folder, job)
        ceilings = timed["ceilings"]
        print(
            f"ceilings: fp32 mm {ceilings['gemm_fp32']:.0f} GFLOP/s, bf16 mm "
            f"{ceilings['gemm_bf16']:.0f} GFLOP/s, copy {ceilings['copy']:.1f} GB/s"
        )
        add_times(case, rows, timed)
    print(
        f"eager bf16's own error on the first {min(case.n, 512)} rows: "
        f"dE {yardstick['de']:.1e}, dC {yardstick['dc']:.1e}"
    )
    for subject in green:
        row = rows[subject.name]
        row["bars"] = "; ".join(bars(case, subject, row, yardstick))
    print(report.table(list(rows.values()), COLUMNS))
    for row in rows.values():
        if row["bars"]:
            print(f"bars {row['name']}: {row['bars']}")
    sys.stdout.flush()
    return list(rows.values())


def blank_row(case: Case) -> dict[str, Any]:
    """Every column of the files, in order, empty."""
    row: dict[str, Any] = {name: getattr(case, name) for name in ("n", "d", "v", "dtype", "data")}
    row["threads"] = case.threads
    row |= dict.fromkeys([*COLUMNS, "loss", "loss_error", "cpu", "rounds", "eps"])
    row |= dict.fromkeys(["dropped_max", "gemm_fp32", "gemm_bf16", "copy"])
    row |= {"note": "", "bars": ""}
    return row


def checked(folder: Path, case: Case, name: str) -> tuple[dict[str, Any], str | None]:
    """Result of the check stage, or why there is none."""
    try:
        return stage("check", folder, {"case": case.as_dict()}, name, memory=True), None
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or "").splitlines() if line.strip()]
        return {}, f"failed: {lines[-1] if lines else f'exit status {error.returncode}'}"


def check_columns(case: Case, result: Mapping[str, Any]) -> dict[str, Any]:
    figures = result["figures"]
    return {
        "loss": result["loss"],
        "loss_error": result["errors"]["loss"],
        "de_error": result["errors"]["de"],
        "dc_error": result["errors"]["dc"],
        "peak_mb": result["peak"] / 2**20,
        "extra_mb": result["extra"] / 2**20,
        "of_logits": result["extra"] / case.logits_bytes,
        "kept": figures.get("kept_fraction"),
        "dropped": figures.get("dropped_mass"),
        "dropped_max": figures.get("dropped_mass_max"),
        "eps": figures.get("eps"),
    }


def red(
    case: Case, subject: Subject, result: Mapping[str, Any], yardstick: Mapping[str, float]
) -> str | None:
    """Why a result is wrong, or None. Twice eager bf16's own error is the most we allow ours."""
    found = result["errors"]
    fp32 = case.dtype == "fp32"
    loss_limit = LOSS_LIMIT[case.dtype] if subject.ours or not fp32 else PEER_LIMIT["fp32"]
    if not found["loss"] <= loss_limit:
        return f"RED: loss off by {found['loss']:.1e}"
    for name in ("de", "dc"):
        limit = 2 * yardstick[name]
        if not subject.ours:
            limit = PEER_LIMIT[case.dtype]
        elif fp32 and subject.bar != "filtered" and subject.name != "auto":
            limit = EXACT_FP32_LIMIT
        if not found[name] <= limit:
            return f"RED: {name} error {found[name]:.1e} above {limit:.1e}"
    return None


def add_times(case: Case, rows: Mapping[str, dict[str, Any]], timed: Mapping[str, Any]) -> None:
    """Fill times, rates and ratios."""
    timings = {
        name: timing.Timing(tuple(timing.Measurement(**run) for run in runs))
        for name, runs in timed["timings"].items()
    }
    ceiling = max(timed["ceilings"]["gemm_fp32"], timed["ceilings"]["gemm_bf16"])
    for name, own in timings.items():
        row = rows[name]
        rate = case.flops / own.total / 1e9
        row |= timed["ceilings"]
        row |= {"forward": own.forward, "total": own.total, "cpu": own.cpu}
        row |= {"spread": own.spread, "rounds": len(own.runs)}
        row |= {"gflops": rate, "of_ceiling": rate / ceiling}
        for peer in RATIOS:
            if peer in timings and peer != name:
                row[f"x_{peer}"] = timing.paired_ratio(timings[peer], own)
        if "eager" in timings and name != "eager":
            row["x_eager_cpu"] = timing.paired_ratio(timings["eager"], own, "cpu")


def bars(
    case: Case, subject: Subject, row: Mapping[str, Any], yardstick: Mapping[str, float]
) -> list[str]:
    """Each bar that applies to a row, with pass or MISS."""
    if not subject.ours or subject.bar is None:
        return []

    def verdict(text: str, passed: bool) -> str:
        return f"{text} {'pass' if passed else 'MISS'}"

    found = []
    least = SPEED_BARS.get((subject.bar, case.dtype))
    if least is not None and row["x_eager"] is not None:
        found.append(verdict(f"{row['x_eager']:.2f} >= {least}x eager", row["x_eager"] >= least))
    if subject.bar == "filtered":
        share = row["of_logits"]
        found.append(verdict(f"{share:.1%} < {MEMORY_BAR:.0%} of logits", share < MEMORY_BAR))
    for name, key in (("dE", "de"), ("dC", "dc")):
        error, limit = row[f"{key}_error"], yardstick[key]
        found.append(
            verdict(f"{name} {error:.1e} <= eager bf16 {limit:.1e}", error <= ERROR_SLACK * limit)
        )
    return found


def stage(
    name: str, folder: Path, job: Mapping[str, Any], *more: str, memory: bool = False
) -> dict[str, Any]:
    """Run a stage in a fresh process and read what it found.

    Raises:
        subprocess.CalledProcessError: if the stage fails; ``stderr`` holds its words.
    """
    (folder / "job.json").write_text(json.dumps(job))
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    environment = os.environ | (timing.memory_environment() if memory else {})
    command = [sys.executable, str(HERE / "cce_stages.py"), name, str(folder), *more]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        if name != "check":
            sys.stderr.write(done.stderr)
        raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr)
    return json.loads(result.read_text()) if result.exists() else {}


def save(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> None:
    """Merge rows into results/<device>/cce.json and write the tables of all of them beside it."""
    folder = RESULTS / facts["device"]
    stamp = {name: facts[name] for name in ("commit", "date", "load")}
    stamped = [{**row, **stamp} for row in rows]
    merged = report.merge_json(folder / "cce.json", stamped, KEY)
    parts = [
        "# Linear cross-entropy: forward and backward",
        "`python benchmarks/bench_cce.py --save`; columns are explained in `../README.md`.",
        report.header(
            facts | dict.fromkeys(("commit", "date", "load"), "per row in cce.json")
        ).replace("# ", "- "),
    ]
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in merged:
        cases.setdefault(tuple(row[k] for k in KEY[:-1]), []).append(row)
    for (n, v, d, dtype, kind), lines in cases.items():
        lines.sort(key=lambda row: place(row["name"]))
        parts.append(f"## N={n} D={d} V={v} {dtype} {kind}")
        runs = sorted({f"commit {r['commit']}, {r['date']}, load {r['load']}" for r in lines})
        parts += ["\n".join(runs), report.table(lines, COLUMNS)]
        met = [f"- {row['name']}: {row['bars']}" for row in lines if row["bars"]]
        if met:
            parts.append("\n".join(met))
    (folder / "cce.md").write_text("\n\n".join(parts) + "\n")


def place(name: str) -> int:
    """Position of a subject in every table; peers that are not in ORDER come last."""
    return ORDER.index(name) if name in ORDER else len(ORDER)


def default_subjects(known: Mapping[str, Subject]) -> list[str]:
    return [name for name in known if name not in ("auto", "reference")]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", type=_shape, metavar="N,D,V", help="repeatable")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--impl", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--data", nargs="+", choices=DATA_KINDS, default=["plaw-2.5"])
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--check", action="store_true", help="errors and memory, no times")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=60.0, help="time to spend per table")
    parser.add_argument("--rounds", type=int, default=3, help="least number of rounds")
    parser.add_argument("--warmup", type=int, default=1, help="calls that are not counted")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<device>/")
    options = parser.parse_args()
    options.shape = options.shape or list(SHAPES)
    return options


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected N,D,V, got {text}")
    return int(parts[0]), int(parts[1]), int(parts[2])


if __name__ == "__main__":
    main()
