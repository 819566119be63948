"""Headers, tables and result files of the benchmarks."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gemma_ext import _loader
from gemma_ext.bench.timing import total_memory
from gemma_ext.files import write_text

Row = Mapping[str, Any]

# (vendor, family, model) -> name, where the model name of a virtual machine hides the generation
_GENERATIONS = {
    ("AuthenticAMD", 25, 1): "amd-epyc-milan",
    ("AuthenticAMD", 25, 17): "amd-epyc-genoa",
    ("AuthenticAMD", 26, 2): "amd-epyc-turin",
    ("GenuineIntel", 6, 106): "intel-ice-lake",
    ("GenuineIntel", 6, 143): "intel-sapphire-rapids",
    ("GenuineIntel", 6, 207): "intel-emerald-rapids",
}


def cpu_info() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo, empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def device_slug(info: Mapping[str, str] | None = None, cores: int | None = None) -> str:
    """Folder name of a machine's results, such as ``cpu-amd-epyc-genoa-2c``."""
    info = cpu_info() if info is None else info
    cores = os.cpu_count() if cores is None else cores
    name = None
    if info.get("cpu family", "").isdigit() and info.get("model", "").isdigit():
        key = (info.get("vendor_id", ""), int(info["cpu family"]), int(info["model"]))
        name = _GENERATIONS.get(key)
    if name is None:
        name = info.get("model name") or platform.machine() or "unknown"
        name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)|@.*", "", name.lower())).strip("-")
    return f"cpu-{name}-{cores}c"


def card_slug(name: str) -> str:
    """Folder name of a card's results, such as ``nvidia-h200``."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return slug if slug.startswith("nvidia") else f"nvidia-{slug}"


def card() -> dict[str, str]:
    """The current CUDA device, its driver and what its kernels were built with."""
    properties = torch.cuda.get_device_properties(0)
    record = _loader.load().record
    return {
        "device": card_slug(properties.name),
        "card": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
        f"{properties.multi_processor_count} multiprocessors",
        "driver": f"{_driver()}, CUDA {torch.version.cuda}",
        "kernels": f"{record['cuda_compiler']}, for {', '.join(record['cuda_archs'])}",
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def machine(device: str = "cpu") -> dict[str, str]:
    """What a number depends on: card, processor, memory, load, torch, threads, commit, time."""
    info = cpu_info()
    return {
        "device": device_slug(info),
        **(card() if device == "cuda" else {}),
        "cpu": f"{info.get('model name', platform.machine())} "
        f"(family {info.get('cpu family', '?')} model {info.get('model', '?')})",
        "cores": str(os.cpu_count()),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory": f"{total_memory() / 2**30:.0f} GiB",
        "load": f"{os.getloadavg()[0]:.2f}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def commit() -> str:
    """Short hash of the checkout this file is in, ``+dirty`` with uncommitted changes.

    A copy without its history takes it from GEMMA_EXT_COMMIT.
    """
    here = Path(__file__).parent

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("GEMMA_EXT_COMMIT", "unknown")
    tracked = git("status", "--porcelain", "--untracked-files=no")
    return head + ("+dirty" if tracked else "")


def header(facts: Mapping[str, str]) -> str:
    return "\n".join(f"# {name}: {value}" for name, value in facts.items())


def number(value: Any, form: str = ".3g") -> str:
    """A cell: text as it is, None as a dash, numbers by ``form``, which "ms" may end: seconds."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if form.endswith("ms"):
        return format(1e3 * value, form.removesuffix("ms"))
    return format(value, form)


def table(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> str:
    """Markdown table, padded so that it reads as plain text too.

    Args:
        rows: one mapping per line; missing keys print a dash.
        columns: key -> (title, number format).
    """
    titles = [title for title, _ in columns.values()]
    cells = [[number(row.get(key), form) for key, (_, form) in columns.items()] for row in rows]
    widths = [max(len(line[i]) for line in [titles, *cells]) for i in range(len(titles))]

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(v.ljust(w) for v, w in zip(values, widths, strict=True)) + " |"

    return "\n".join([line(titles), line(["-" * w for w in widths]), *map(line, cells)])


def append_csv(path: Path, rows: Sequence[Row]) -> None:
    """Append rows; the column titles are written when the file is new.

    Raises:
        ValueError: if the file has other columns.
    """
    if not rows:
        return
    names = list(rows[0])
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != names:
            raise ValueError(f"csv: expected {path} to have columns {names}, got {found}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def merge_json(path: Path, rows: Sequence[Row], key: Sequence[str]) -> list[dict[str, Any]]:
    """Put rows into a JSON list in place of older rows with the same key, and return the list."""
    kept = json.loads(path.read_text()) if path.exists() else []
    fresh = {tuple(row[k] for k in key) for row in rows}
    merged = [row for row in kept if tuple(row[k] for k in key) not in fresh]
    merged += [dict(row) for row in rows]
    merged.sort(key=lambda row: tuple(str(row[k]).rjust(12) for k in key))
    write_text(path, json.dumps(merged, indent=1) + "\n")
    return merged


def table_and_bars(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> str:
    """As `table`, and a line for each row that has bars."""
    bars = [f"bars {row['name']}: {row['bars']}" for row in rows if row["bars"]]
    return "\n".join([table(rows, columns), *bars])


@dataclass(frozen=True)
class Layout:
    """How the results of a benchmark are laid out on their page.

    Attributes:
        title: of the page. about: the line below it: the command, where columns are explained.
        case: columns that make rows one table; with "name" they are the key of a row.
        label: heading of a table, from one of its rows.
        columns: as in `table`.
        place: position of a row in its table, from its name.
    """

    title: str
    about: str
    case: Sequence[str]
    label: Callable[[Row], str]
    columns: Mapping[str, tuple[str, str]]
    place: Callable[[str], int]


def save(
    folder: Path, stem: str, rows: Sequence[Row], facts: Mapping[str, str], layout: Layout
) -> None:
    """Merge rows into <stem>.json of a folder and write the page of all of them beside it."""
    stamp = {name: facts[name] for name in ("commit", "date", "load")}
    stamped = [{**row, **stamp} for row in rows]
    merged = merge_json(folder / f"{stem}.json", stamped, [*layout.case, "name"])
    (folder / f"{stem}.md").write_text(page(merged, facts, layout))


def page(rows: Sequence[Row], facts: Mapping[str, str], layout: Layout) -> str:
    """The page of a list of saved rows: a table per case, its runs above, its bars below."""
    once = dict.fromkeys(("commit", "date", "load"), "per row in the json file")
    parts = [f"# {layout.title}", layout.about, header({**facts, **once}).replace("# ", "- ")]
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[k] for k in layout.case), []).append(row)
    for lines in cases.values():
        lines.sort(key=lambda row: layout.place(row["name"]))
        runs = sorted({f"commit {r['commit']}, {r['date']}, load {r['load']}" for r in lines})
        parts += [f"## {layout.label(lines[0])}", "\n".join(runs), table(lines, layout.columns)]
        met = [f"- {row['name']}: {row['bars']}" for row in lines if row["bars"]]
        if met:
            parts.append("\n".join(met))
    return "\n\n".join(parts) + "\n"
