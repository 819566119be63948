"""Options that benchmarks share: one name, one meaning."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from gemma_ext.bench.subject import DTYPES


def parser_of(
    about: str | None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    dtypes: Iterable[str] = tuple(DTYPES),
    threads: int | None = None,
    seconds: float | None = None,
    rounds: int | None = None,
) -> argparse.ArgumentParser:
    """A parser with `--save`, and with those of the options below that have a default here.

    Args:
        about: the docstring of the benchmark, shown as it is.
        device: "cpu" or "cuda". dtype: one of `dtypes`.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def shared(name: str, default: Any, **how: Any) -> None:
        if default is not None:
            parser.add_argument(name, default=default, **how)

    shared("--device", device, choices=("cpu", "cuda"))
    shared("--dtype", dtype, choices=tuple(dtypes))
    shared("--threads", threads, type=int, help="of torch")
    shared("--seconds", seconds, type=float, help="for timing: rounds are added up to here")
    shared("--rounds", rounds, type=int, help="least number of rounds")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<device>/")
    return parser


def shape_of(text: str) -> tuple[int, int, int]:
    """ "N,D,V" as three sizes."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected N,D,V, got {text}")
    return int(parts[0]), int(parts[1]), int(parts[2])
