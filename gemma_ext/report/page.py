"""Pages: one self-contained HTML file each, from a template that extends `base.html.jinja`.

A template fills the blocks title, headline, lead, sections and last; `numbers` become the cards at
the top and `machine` the table at the end.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from gemma_ext import _loader
from gemma_ext._version import __version__
from gemma_ext.extras import require
from gemma_ext.files import write_text

BASE = "base.html.jinja"


def write_page(
    path: Path,
    package: str,
    template: str,
    *,
    numbers: list[tuple[str, str]],
    machine: dict[str, str],
    **values: Any,
) -> None:
    """Renders a template and writes the page beside its place, then renames it.

    Args:
        path: of the page; its folder is made.
        package: that the template lies in.
        template: file name of the template.
        numbers: (name, value) of the cards.
        machine: rows of the machine table.
        values: for the template. A name that it uses and that is missing is an error.

    Raises:
        ImportError: jinja2 is missing.
    """
    require("gemma_ext.report", "merge", "jinja2")
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader("gemma_ext.report", "")]),
        autoescape=True,
        undefined=StrictUndefined,
    )
    html = environment.get_template(template).render(numbers=numbers, machine=machine, **values)
    write_text(path, html)


def this_machine() -> dict[str, str]:
    """Rows of the machine table: processor, cores, instruction set, versions."""
    build = _loader.load().record
    return {
        "processor": _processor(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads used",
        "instruction set": torch.ops.gemma_ext.cpu_isa(),
        "torch": torch.__version__,
        "gemma_ext": f"{__version__}, commit {build['commit']}",
    }


def size(count: float) -> str:
    """Bytes for a reader."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        "unknown",
    )
