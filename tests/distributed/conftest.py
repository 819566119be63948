"""Runs the checks of a module on several gloo processes, once per module and number of ranks."""

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
_LIMIT_S = 240


@cache
def _outcomes(module: str, world: int) -> list[dict[str, str | None]]:
    """What each rank reported, {check: traceback or None}; checks it did not reach are absent."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    with TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, HERE / "ranks.py", module, str(rank), str(world), folder],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        results = []
        try:
            logs = [rank.communicate(timeout=_LIMIT_S)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        for rank, log in enumerate(logs):
            result = Path(folder, f"{rank}.json")
            results.append(json.loads(result.read_text()) if result.exists() else {"": log})
        return results


@pytest.fixture
def assert_check():
    """Assert that one check passed on every rank."""

    def check(module: str, world: int, name: str) -> None:
        __tracebackhide__ = True
        outcomes = _outcomes(module, world)
        if all(name in outcome and outcome[name] is None for outcome in outcomes):
            return
        report = []
        for rank, outcome in enumerate(outcomes):
            last = list(outcome)[-1]
            unreached = f"not reached: the run ended in {last}" if last else outcome[last]
            report.append(f"rank {rank}: {outcome.get(name, unreached) or 'passed'}")
        pytest.fail("\n".join(report), pytrace=False)

    return check
