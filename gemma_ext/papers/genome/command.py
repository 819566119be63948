"""`gemma-ext evolve`."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_ext.command_line import one_sentence
from gemma_ext.distributed.fleet import open_fleet
from gemma_ext.extras import require
from gemma_ext.files import new_folder
from gemma_ext.papers.genome.baselines import BASELINES
from gemma_ext.papers.genome.config import COMPAT, search_from
from gemma_ext.papers.genome.lineage import FINISHED
from gemma_ext.papers.genome.materialise import Materialiser
from gemma_ext.papers.genome.models import Experts, ModelWorker
from gemma_ext.papers.genome.page import number, write_report
from gemma_ext.papers.genome.pool import Pool
from gemma_ext.papers.genome.recipe import Genome, to_table
from gemma_ext.papers.genome.study import run_study
from gemma_ext.papers.genome.tasks import Task, load_task
from gemma_ext.progress import progress_bar

_KEYS = (
    "model", "adapters", "checkpoints", "tasks", "search", "baselines", "vote", "out", "workers",
    "ray", "threads", "device", "dtype", "language_model",
)  # fmt: skip


def main(
    config: Annotated[Path, typer.Argument(help="YAML: pool, tasks, search.", exists=True)],
    out: Annotated[Path | None, typer.Option(help="Folder of the run, before the file's.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; 0 for this one.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster, auto or local.")
    ] = None,
    compat: Annotated[
        str | None, typer.Option(help=f"{' or '.join(COMPAT)}: with the release's defects.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Evolve a pool of LoRA adapters or checkpoints for a new task, without gradients (GENOME).

    \b
    Example: gemma-ext evolve evolve.yml --workers 2, with in evolve.yml:
        model: google/gemma-2-2b-it
        adapters:
          - experts/code
          - experts/science
        tasks:
          - {name: arc, kind: choice, file: arc.jsonl, weight: 1.0}
        search: {method: genome+, generations: 10}
        out: out/evolve
    """
    with one_sentence("evolve"):
        made = run_config(
            config, out=out, workers=workers, ray=ray, compat=compat, show_progress=not quiet
        )
    for one in made["summaries"]:
        print(f"{one.method:<24} {one.used:6.0f} evaluations   test {number(one.test)}")
    print(made["best"])
    print(made["page"])


def run_config(
    path: Path,
    *,
    out: Path | None = None,
    workers: int | None = None,
    ray: str | None = None,
    compat: str | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Runs a configuration; arguments go before what the file says.

    Returns:
        best: folder of the chosen individual; page: the report; summaries: its table.

    Raises:
        ValueError: a key or value that does not fit.
    """
    config = read_config(path)
    search = search_from(config["search"] | ({"compat": compat} if compat else {}))
    here = path.parent
    out = out or here / config.get("out", "out/evolve")
    experts = Experts(
        _place(here, config.get("model")),
        tuple(_place(here, x) for x in config.get("adapters", ())),
        tuple(_place(here, x) for x in config.get("checkpoints", ())),
    )
    tasks = tuple(_task(here, task) for task in config["tasks"])
    pool = experts.pool()
    worker = ModelWorker(
        experts,
        tasks,
        out.resolve() / "run" / FINISHED,
        device=config.get("device", "cpu"),
        dtype=config.get("dtype", "auto"),
        options=config.get("language_model"),
    )
    workers = config.get("workers", 0) if workers is None else workers
    ray = ray or config.get("ray")
    threads = config.get("threads", 1)

    def bar(title: str, total: int) -> contextlib.AbstractContextManager:
        return progress_bar(title, total, show_progress)

    out.mkdir(parents=True, exist_ok=True)
    with open_fleet(worker, workers, ray=ray, threads=threads) as fleet:
        evolved, rows = run_study(
            fleet,
            search,
            len(experts),
            {task.name: task.weight for task in tasks},
            out,
            identity={"pool": pool.digest, "tasks": json.dumps([task.digest for task in tasks])},
            baselines=config.get("baselines", list(BASELINES)),
            members=config.get("vote", 5),
            free_text=[task.name for task in tasks if task.metric == "f1"],
            bar=bar,
        )
    best = out / "best"
    save_best(pool, Materialiser(pool, worker.folder), rows[0].genome, best)
    facts = {
        "pool": ", ".join(pool.names),
        "tasks": ", ".join(
            f"{t.name} ({len(t.validation)} + {len(t.test)} samples)" for t in tasks
        ),
        "search": f"{search.method}, seed {search.seed}, {evolved.generations} generations",
        "defects kept": ", ".join(sorted(search.defects)) or "none",
    }
    page = out / "report.html"
    found = write_report(
        page, [rows], title=f"{search.method} over {len(experts)} experts", facts=facts
    )
    return {"best": best, "page": page, "summaries": found}


def save_best(pool: Pool, materialiser: Materialiser, genome: Genome, best: Path) -> None:
    """The individual as a folder, with its recipe in genome.json; one already there is replaced."""
    note = best / "genome.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8"))["genome"] == genome.key:
        return
    record = {
        "genome": genome.key,
        "pool": pool.digest,
        "experts": pool.names,
        "recipes": to_table([genome]),
    }
    with new_folder(best) as beside:
        pool.fill(beside, materialiser.tensors(genome))
        (beside / note.name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(best, ignore_errors=True)


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a configuration file.

    Raises:
        ValueError: an unknown or a missing key.
        ImportError: pyyaml is missing.
    """
    require("a configuration", "genome", "yaml")
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(config).__name__}")
    for key in config:
        if key not in _KEYS:
            raise ValueError(f"{path}: expected keys of {', '.join(_KEYS)}, got {key!r}")
    if not config.get("tasks"):
        raise ValueError(f"{path}: expected tasks, got none")
    return config | {"search": config.get("search") or {}}


def _task(here: Path, values: Mapping[str, Any]) -> Task:
    values = dict(values)
    for key in ("name", "file", "kind"):
        if key not in values:
            raise ValueError(f"tasks: expected the key {key!r}, got {list(values)}")
    for key in ("file", "test"):
        if key in values:
            values[key] = here / values[key]
    try:
        return load_task(values.pop("name"), values.pop("file"), values.pop("kind"), **values)
    except TypeError as error:
        raise ValueError(f"tasks: expected options of a task, got {error}") from None


def _place(here: Path, name: str | None) -> str | None:
    """A folder beside the configuration, else what stands there: a hub id."""
    return str(here / name) if name is not None and (here / name).exists() else name
