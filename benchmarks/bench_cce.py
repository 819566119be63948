"""Loss of an LM head, forward and backward: gemma_ext against its peers, in one run.

    python benchmarks/bench_cce.py --shape 512,2304,32768 --dtype bf16 --data plaw-2.5
    python benchmarks/bench_cce.py --impl eager cce exact --csv out/cce.csv --save
    python benchmarks/bench_cce.py --device cuda --budget 200 --save

Every subject is first checked in a process of its own against the exact float32 loss and gradients
of the unrounded inputs (sampled, see ``gemma_ext.bench.truth``), which also measures its peak
memory; one that fails prints no time. The others are then timed in turn in one process. On a card
one process does all of it for a case, and cases follow each other as long as the budget lasts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cce_rows import (
    FEW_ROWS,
    KEY,
    add_times,
    bars,
    blank_row,
    check_columns,
    columns_of,
    place,
    red,
)

from gemma_ext.bench import report
from gemma_ext.bench.data import DATA_KINDS
from gemma_ext.bench.options import parser_of, shape_of
from gemma_ext.bench.stages import LEAST_SECONDS, Effort, Stages
from gemma_ext.bench.subject import DTYPES, Case, Subject

HERE = Path(__file__).parent
RESULTS = HERE / "results"
STAGES = Stages(HERE / "cce_stages.py")
SHAPES = tuple((n, 2304, v) for v in (32768, 256000) for n in (512, 2048, 8192))
CARD_CASES = (  # rows, dtype, data; what matters most comes first, and has all peers
    (8192, "bf16", "plaw-2.5"),
    (512, "bf16", "plaw-2.5"),
    (8192, "bf16", "plaw-1.6"),
    (8192, "bf16", "plaw-1.3"),
    (8192, "bf16", "plaw-4"),
    (2048, "bf16", "plaw-2.5"),
    (512, "fp32", "plaw-2.5"),
    (512, "fp16", "plaw-2.5"),
    (8192, "bf16", "random-init"),
    (2048, "fp32", "plaw-2.5"),
    (2048, "fp16", "plaw-2.5"),
)
CARD_CASE_SECONDS = 100.0


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
    facts = report.machine(options.device)
    print(report.header(facts), flush=True)
    ran, failed = False, False
    run = run_card if options.device == "cuda" or options.card else run_cpu
    for rows in run(options, chosen, effort):
        ran = True
        failed |= not rows or any(
            known[row["name"]].ours and row["note"].startswith(("RED", "failed"))
            for row in rows
            if row["name"] in known
        )
        if options.csv:
            report.append_csv(options.csv, rows)
        if options.save and rows:
            report.save(RESULTS / facts["device"], "cce", rows, facts, layout(options.device))
    sys.exit(int(failed or not ran))


def run_cpu(
    options: argparse.Namespace, chosen: Sequence[Subject], effort: Effort
) -> Iterator[list[dict[str, Any]]]:
    """Rows of each case in turn."""
    for shape in options.shape or SHAPES:
        for kind in options.data or ["plaw-2.5"]:
            dtypes = options.dtype or ["bf16", "fp32"]
            yield from run_shape(shape, kind, dtypes, chosen, effort, options.threads)


def run_card(
    options: argparse.Namespace, chosen: Sequence[Subject], effort: Effort
) -> Iterator[list[dict[str, Any]]]:
    """Rows of each case in turn, while the budget lasts."""
    end = time.monotonic() + options.budget
    cases = card_cases(options)
    for i, case in enumerate(cases):
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"\nnot run, out of time: {'; '.join(c.label() for c in cases[i:])}")
            return
        subjects = [s for s in chosen if i == 0 or options.impl or worth_again(s, case)]
        yield run_card_case(case, subjects, effort, min(left, CARD_CASE_SECONDS))


def worth_again(subject: Subject, case: Case) -> bool:
    """Whether a subject runs on later cases too: the place of most peers is known after one."""
    return subject.ours or (subject.name == "compile" and case.n < FEW_ROWS)


def card_cases(options: argparse.Namespace) -> list[Case]:
    """The cases that the options name, or CARD_CASES."""
    if options.shape or options.dtype or options.data:
        return [
            Case(*shape, dtype, kind, device=options.device)
            for shape in options.shape or [(8192, 2304, 256000)]
            for dtype in options.dtype or ["bf16"]
            for kind in options.data or ["plaw-2.5"]
        ]
    return [
        Case(n, 2304, 256000, dtype, kind, device=options.device) for n, dtype, kind in CARD_CASES
    ]


def run_card_case(
    case: Case, chosen: Sequence[Subject], effort: Effort, seconds: float
) -> list[dict[str, Any]]:
    """All subjects on one case; prints a table."""
    print(f"\n## {case.label()}", flush=True)
    found = STAGES.case(case.as_dict(), [s.name for s in chosen], effort, seconds)
    if not found:
        print("failed before the first subject, or stopped at its time limit", flush=True)
        return []
    rows = sorted(found["rows"], key=lambda row: place(row["name"]))
    print_table(rows, found["yardstick"], case)
    return rows


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
        STAGES.run("prepare", folder, {"case": case.as_dict(), "uncapped": uncapped})
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
        names = [s.name for s in green]
        job = {"case": case.as_dict(), "names": names, "timing": effort.timing}
        add_times(case, rows, STAGES.run("time", folder, job))
    for subject in green:
        row = rows[subject.name]
        row["bars"] = "; ".join(bars(case, subject, row, yardstick))
    print_table(list(rows.values()), yardstick, case)
    return list(rows.values())


def print_table(
    rows: Sequence[Mapping[str, Any]], yardstick: Mapping[str, float], case: Case
) -> None:
    """Ceilings, eager's error, the table, and the bars under it."""
    ceilings = next((row for row in rows if row["copy"] is not None), None)
    if ceilings:
        print(
            f"ceilings: fp32 mm {ceilings['gemm_fp32']:.0f} GFLOP/s, bf16 mm "
            f"{ceilings['gemm_bf16']:.0f} GFLOP/s, copy {ceilings['copy']:.1f} GB/s"
        )
    print(
        f"eager bf16's own error on the first {min(case.n, 512)} rows: "
        f"dE {yardstick['de']:.1e}, dC {yardstick['dc']:.1e}"
    )
    print(report.table_and_bars(rows, columns_of(case.device)), flush=True)


def checked(folder: Path, case: Case, name: str) -> tuple[dict[str, Any], str | None]:
    """Result of the check stage, or why there is none."""
    try:
        job = {"case": case.as_dict()}
        return STAGES.run("check", folder, job, name, memory=True), None
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or "").splitlines() if line.strip()]
        return {}, f"failed: {lines[-1] if lines else f'exit status {error.returncode}'}"


def layout(device: str) -> report.Layout:
    return report.Layout(
        title="Linear cross-entropy: forward and backward",
        about=f"`python benchmarks/bench_cce.py --device {device} --save`; columns are explained "
        "in `../../README.md`.",
        case=KEY[:-1],
        label=lambda row: "N={n} D={d} V={v} {dtype} {data}".format_map(row),
        columns=columns_of(device),
        place=place,
    )


def default_subjects(known: Mapping[str, Subject]) -> list[str]:
    return [name for name in known if name not in ("lean", "lean-exact", "auto", "reference")]


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__, device="cpu", threads=os.cpu_count(), rounds=3)
    parser.add_argument(
        "--shape", action="append", type=shape_of, metavar="N,D,V", help="repeatable"
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES))
    parser.add_argument("--impl", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--data", nargs="+", choices=DATA_KINDS)
    parser.add_argument(
        "--card", action="store_true", help="as on a card: one process per case, within --budget"
    )
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--check", action="store_true", help="errors and memory, no times")
    parser.add_argument(
        "--seconds", type=float, help="time to spend per table, 60 by default, 6 on a card"
    )
    parser.add_argument(
        "--budget", type=float, default=240.0, help="seconds for everything, on a card"
    )
    parser.add_argument("--warmup", type=int, default=1, help="calls that are not counted")
    options = parser.parse_args()
    if options.seconds is None:
        options.seconds = 6.0 if options.device == "cuda" else 60.0
    return options


if __name__ == "__main__":
    main()
