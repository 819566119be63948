"""Stages of a benchmark, each in a process of its own: ``SCRIPT STAGE FOLDER ...``.

A stage reads FOLDER/job.json and writes FOLDER/result.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_ext.bench import timing

LEAST_SECONDS = 20.0  # to start a process, make the data and check one subject


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds per table, least rounds, calls that are not counted."""

    seconds: float
    rounds: int
    check_only: bool
    warmup: int

    @property
    def timing(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "least": self.rounds, "warmup": self.warmup}


@dataclass(frozen=True)
class Stages:
    """The stages of a script."""

    script: Path

    def run(
        self, name: str, folder: Path, job: Mapping[str, Any], *more: str, memory: bool = False
    ) -> dict[str, Any]:
        """Run a stage in a fresh process and read what it found.

        Args:
            memory: it measures its own peak memory, and the caller says why it failed.

        Raises:
            subprocess.CalledProcessError: if the stage fails; ``stderr`` holds its words.
        """
        result = prepare(folder, job)
        environment = os.environ | (timing.memory_environment() if memory else {})
        command = [sys.executable, str(self.script), name, str(folder), *more]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            if not memory:
                sys.stderr.write(done.stderr)
            raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr)
        return read(result)

    def card(self, folder: Path, job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """What ``one_process.run`` wrote down, also if it failed or took too long; {} if not."""
        result = prepare(folder, job)
        command = [sys.executable, str(self.script), "card", str(folder)]
        try:
            subprocess.run(command, timeout=seconds)
        except subprocess.TimeoutExpired:
            print(f"stopped after {seconds:.0f} s", flush=True)
        return read(result)

    def case(
        self, case: Mapping[str, Any], names: Sequence[str], effort: Effort, seconds: float
    ) -> dict[str, Any]:
        """``card`` for a case; one that broke the card is left out of a retry. {} if none ran."""
        end = time.monotonic() + seconds
        names, broken, found = list(names), [], {}
        with tempfile.TemporaryDirectory(prefix="bench_") as folder:
            while names:
                left = max(end - time.monotonic(), LEAST_SECONDS)
                times = effort.timing | {"deadline": left, "check_only": effort.check_only}
                job = {"case": case, "names": names, "effort": times}
                found = self.card(Path(folder), job, left)
                if not found.get("lost"):
                    break
                names.remove(found["lost"])
                broken += [row for row in found["rows"] if row["name"] == found["lost"]]
        if found:
            kept = [row for row in found["rows"] if row["name"] in names or row["total"]]
            found["rows"] = [*broken, *kept]
        return found


def prepare(folder: Path, job: Mapping[str, Any]) -> Path:
    """Write the job down; returns where the result is to come, which is not there yet."""
    (folder / "job.json").write_text(json.dumps(job))
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    return result


def read(result: Path) -> dict[str, Any]:
    """What a stage wrote down, {} if nothing."""
    return json.loads(result.read_text()) if result.exists() else {}
