"""Merges from disk to disk: gemma_ext against reading and writing the same bytes, and mergekit.

    python benchmarks/bench_merge.py --folder /data/merges --mergekit ENV/bin/python --save
    python benchmarks/bench_merge.py --layers 6 --vocab 64000 --method ties sce --rounds 3

Sources are a base and three fine-tunes in the shape of Gemma-2-2B, generated into --folder (on a
disk, not in memory) and kept there. Every subject runs in a process of its own from the same
recipe; in a round they run one after another for each method, ours last. Times are those of the
merge, fsync of the output included, imports not; "x raw time" is over the faster of the two ways to
move the bare bytes. mergekit needs an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_models import make_models, model_bytes

from gemma_ext.bench import report
from gemma_ext.bench.options import parser_of

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MODELS = 3
WITHOUT_BASE = ("linear", "karcher")
PARAMETERS = {  # of each model, of the merge
    "linear": ({"weight": [0.5, 0.3, 0.2]}, {}),
    "task_arithmetic": ({"weight": [0.5, 0.3, 0.2]}, {}),
    "dare_linear": ({"weight": [0.5, 0.3, 0.2], "density": [0.2] * 3}, {}),
    "ties": ({"weight": [0.5, 0.3, 0.2], "density": [0.2] * 3}, {}),
    "sce": ({}, {"select_topk": 0.2}),
    "karcher": ({}, {}),
}
RAW = ("raw", "raw direct")  # through the page cache and past it
SUBJECTS = (*RAW, "mergekit", "gemma_ext")
RAW_BAR, PEER_BAR, PEAK_BAR = 1.25, 3.0, 1 << 30
AGAINST_PEER = ("dare_linear", "ties", "sce", "karcher")
CHUNK_BYTES = 4 << 20  # of the engine, per model
COLUMNS = {
    "name": ("subject", ""),
    "wall": ("wall s", ".2f"),
    "spread": ("spread", ".2f"),
    "cpu": ("cpu s", ".1f"),
    "peak_mb": ("peak MB", ".0f"),
    "rate": ("GB/s", ".2f"),
    "of_raw": ("x raw time", ".2f"),
    "x_mergekit": ("x mergekit", ".1f"),
    "note": ("note", ""),
}


def main() -> None:
    options = parse_options()
    facts = report.machine()
    print(report.header(facts), flush=True)
    root = options.folder.resolve()
    needed = (MODELS + 3) * model_bytes(options.layers, options.vocab)
    root.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(root).free < needed:
        raise SystemExit(
            f"--folder: expected {needed / 1e9:.0f} GB free in {root}: fewer --layers, or --vocab"
        )
    sources = make_models(root, options.layers, options.vocab, MODELS)
    rows = []
    for method in options.method:
        print(f"\n## {label(row_of(options, method, ''))}", flush=True)
        found = run_method(options, method, sources)
        print(report.table_and_bars(found, COLUMNS), flush=True)
        rows += found
    if options.save:
        report.save(RESULTS / facts["device"], "merge", rows, facts, LAYOUT)
    sys.exit(any(row["name"] == "gemma_ext" and row["wall"] is None for row in rows))


def run_method(
    options: argparse.Namespace, method: str, sources: Sequence[Path]
) -> list[dict[str, Any]]:
    used = sources[1:] if method in WITHOUT_BASE else sources
    subjects = [s for s in SUBJECTS if s in options.subject]
    job = {
        "recipe": recipe_of(method, sources),
        "sources": [str(path) for path in used],
        "threads": options.threads,
    }
    path = options.folder.resolve() / "job.json"
    path.write_text(json.dumps(job))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in subjects}
    notes = dict.fromkeys(subjects, "")
    for _ in range(options.rounds):
        for name in subjects:
            if not notes[name]:
                run, notes[name] = run_subject(options, name, path, used)
                runs[name] += [run] if run else []
    rows = {name: row_of(options, method, name) | {"note": notes[name]} for name in subjects}
    moved = (len(used) + 1) * model_bytes(options.layers, options.vocab)
    for name, row in rows.items():
        if runs[name]:
            add_figures(row, runs, name, moved)
            row["bars"] = "; ".join(bars(method, row)) if name == "gemma_ext" else ""
    return list(rows.values())


def run_subject(
    options: argparse.Namespace, name: str, job: Path, sources: Sequence[Path]
) -> tuple[dict[str, Any] | None, str]:
    """One run, or why there is none."""
    if name == "mergekit" and options.mergekit is None:
        return None, "not run: --mergekit names no environment"
    python = str(options.mergekit) if name == "mergekit" else sys.executable
    out = job.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name("out.partial"), ignore_errors=True)
    settle_cache(sources, options.cold)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [python, HERE / "merge_subjects.py", name, job, out]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=options.limit
        )
    except subprocess.TimeoutExpired:
        return None, f"not finished after {options.limit:.0f} s"
    finally:
        shutil.rmtree(out, ignore_errors=True)
    if done.returncode == 0:
        run = json.loads(done.stdout.splitlines()[-1])
        return (
            (None, f"RED: {run['wrong'][0]} is not what memory gives")
            if run["wrong"]
            else (run, "")
        )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    killed = f"killed by signal {-done.returncode}" if done.returncode < 0 else "failed"
    return None, f"{killed}: {lines[-1][:120]}" if lines else killed


def settle_cache(sources: Sequence[Path], cold: bool) -> None:
    """Earlier writes on the disk; the sources out of the page cache, or in it as far as it goes."""
    os.sync()
    for path in (file for source in sources for file in source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(16 << 20):
                    pass


def recipe_of(method: str, sources: Sequence[Path]) -> str:
    """The recipe in mergekit's YAML, which JSON is."""
    own, whole = PARAMETERS[method]
    models = [
        {"model": str(path), "parameters": {key: values[m] for key, values in own.items()}}
        for m, path in enumerate(sources[1:])
    ]
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method not in WITHOUT_BASE:
        recipe["base_model"] = str(sources[0])
    return json.dumps({**recipe, "parameters": whole} if whole else recipe)


def row_of(options: argparse.Namespace, method: str, name: str) -> dict[str, Any]:
    size = model_bytes(options.layers, options.vocab)
    row = dict.fromkeys(COLUMNS) | {"bars": "", "note": "", "rounds": options.rounds}
    cache = "cold" if options.cold else "warm"
    return row | {"method": method, "gb": round(size / 1e9, 2), "cache": cache, "name": name}


def add_figures(
    row: dict[str, Any], runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str, moved: int
) -> None:
    walls = [run["wall"] for run in runs[name]]
    row["wall"] = statistics.median(walls)
    row["spread"] = (max(walls) - min(walls)) / row["wall"]
    row["cpu"] = statistics.median(run["cpu"] for run in runs[name])
    row["peak_mb"] = max(run["peak"] for run in runs[name]) / 1e6
    row["rate"] = moved / row["wall"] / 1e9
    row["of_raw"] = paired(runs, name, RAW)
    if name == "gemma_ext":
        over = paired(runs, "gemma_ext", ("mergekit",))
        row["x_mergekit"] = 1 / over if over else None


def paired(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str, others: Sequence[str]
) -> float | None:
    """Median over rounds of time / that of the fastest of the others."""
    ran = [runs[other] for other in others if runs.get(other)]
    if not ran:
        return None
    fastest = [min(run["wall"] for run in peers) for peers in zip(*ran, strict=False)]
    pairs = zip(runs[name], fastest, strict=False)
    return statistics.median(own["wall"] / peer for own, peer in pairs)


def bars(method: str, row: Mapping[str, Any]) -> list[str]:
    def verdict(text: str, passed: bool) -> str:
        return f"{text} {'pass' if passed else 'MISS'}"

    models = MODELS + (method not in WITHOUT_BASE)
    most = PEAK_BAR + models * CHUNK_BYTES
    found = [verdict(f"peak < 1 GiB + {models} chunks", row["peak_mb"] * 1e6 < most)]
    if row["of_raw"]:
        found.append(verdict(f"<= {RAW_BAR} x raw time", row["of_raw"] <= RAW_BAR))
    if row["x_mergekit"] and method in AGAINST_PEER:
        found.append(verdict(f">= {PEER_BAR} x mergekit", row["x_mergekit"] >= PEER_BAR))
    return found


def label(row: Mapping[str, Any]) -> str:
    return "{method}, 3 models of {gb} GB, page cache {cache}".format_map(row)


LAYOUT = report.Layout(
    title="Merges from disk to disk",
    about="`python benchmarks/bench_merge.py --save`; columns are explained in `../../README.md`.",
    case=("method", "gb", "cache"),
    label=label,
    columns=COLUMNS,
    place=lambda name: SUBJECTS.index(name),
)


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, default=HERE / ".merges", help="on a disk")
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--vocab", type=int, default=256000)
    parser.add_argument("--method", nargs="+", choices=PARAMETERS, default=list(PARAMETERS))
    parser.add_argument("--subject", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--mergekit", type=Path, help="a Python that has mergekit")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="sources leave the page cache first")
    parser.add_argument("--threads", type=int, default=4, help="that read and write")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for a run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
