"""Runs the checks of a module on several gloo processes, once per module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

HERE = Path(__file__).parent


@cache
def _outcomes(module: str) -> dict[int, list[dict[str, str | None]]]:
    """What each rank of each group reported, {check: traceback or None}, as far as it came."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    with TemporaryDirectory() as folder:
        log = subprocess.run(
            [sys.executable, HERE / "ranks.py", module, folder],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ).stdout
        outcomes = {}
        for world in (2, 4):
            files = [Path(folder, f"{world}-{rank}.json") for rank in range(world)]
            outcomes[world] = [
                json.loads(file.read_text()) if file.exists() else {"": log} for file in files
            ]
        return outcomes


@pytest.fixture
def assert_check():
    """Assert that one check passed on every rank."""

    def check(module: str, world: int, name: str) -> None:
        __tracebackhide__ = True
        outcomes = _outcomes(module)[world]
        if all(name in outcome and outcome[name] is None for outcome in outcomes):
            return
        report = []
        for rank, outcome in enumerate(outcomes):
            last = list(outcome)[-1]
            unreached = f"not reached: the run ended in {last}" if last else outcome[last]
            report.append(f"rank {rank}: {outcome.get(name, unreached) or 'passed'}")
        pytest.fail("\n".join(report), pytrace=False)

    return check
