"""Timing, memory and report tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_ext.bench import report, timing

ROOT = Path(__file__).parents[2]


def test_rounds_alternate_and_ratios_pair() -> None:
    calls: list[str] = []

    def step(name: str, seconds: float):
        def run(mark: timing.Mark) -> None:
            calls.append(name)
            time.sleep(seconds)
            mark()
            time.sleep(seconds)

        return run

    found = timing.interleave(
        {"slow": step("slow", 0.1), "fast": step("fast", 0.005)}, seconds=0, least=3, warmup=0
    )
    assert calls == ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert timing.paired_ratio(found["slow"], found["fast"]) > 2
    assert found["slow"].forward == pytest.approx(found["slow"].total / 2, rel=0.3)


_MEMORY = """
import torch
from gemma_ext.bench.timing import PeakMemory
freed = torch.empty(64 << 20, dtype=torch.uint8)
del freed
with PeakMemory() as memory:
    before = memory.peak()
    untouched = torch.empty(32 << 20, dtype=torch.uint8)
    del untouched
    print(before, memory.peak())
"""


def test_peak_memory_sees_freed_and_untouched_bytes() -> None:
    environment = os.environ | timing.memory_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY], env=environment, capture_output=True, text=True, check=True
    )
    before, peak = map(int, done.stdout.split())
    # The kernel counts resident pages in batches: a few hundred KiB of slack.
    assert before < 1 << 20
    assert 31 << 20 <= peak < 34 << 20


def test_device_slug() -> None:
    genoa = {"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "17"}
    assert report.device_slug(genoa, 2) == "cpu-amd-epyc-genoa-2c"
    other = {"model name": "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz"}
    assert report.device_slug(other, 12) == "cpu-intel-core-i7-9750h-cpu-12c"


def test_table_prints_dashes_for_what_is_missing() -> None:
    text = report.table([{"a": 0.5}, {"b": "x"}], {"a": ("A", ".0%"), "b": ("B", "")})
    assert text.splitlines()[2:] == ["| 50% | - |", "| -   | x |"]


def test_csv_refuses_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    report.append_csv(path, [{"a": 1}])
    report.append_csv(path, [{"a": 2}])
    assert path.read_text().split() == ["a", "1", "2"]
    with pytest.raises(ValueError, match="columns"):
        report.append_csv(path, [{"b": 1}])


def test_json_rows_are_replaced_by_key(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    report.merge_json(path, [{"k": "a", "v": 1}, {"k": "b", "v": 2}], ["k"])
    merged = report.merge_json(path, [{"k": "a", "v": 3}], ["k"])
    assert merged == [{"k": "a", "v": 3}, {"k": "b", "v": 2}]
    assert json.loads(path.read_text()) == merged


def test_benchmark_prints_a_line_per_subject_and_no_time_for_a_red_check(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_cce.py")]
    command += ["--shape", "64,96,600", "--dtype", "fp32", "--impl", "eager", "reference"]
    command += ["--seconds", "0", "--rounds", "1", "--csv", str(rows)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "# commit:" in done.stdout
    lines = rows.read_text().splitlines()
    assert [line.split(",")[6] for line in lines[1:]] == ["eager", "reference"]
    assert "RED" not in done.stdout


def test_red_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_cce
    import ours

    from gemma_ext.bench.subject import Case

    case = Case(64, 96, 600, "bf16", "plaw-4")
    filtered = ours.SUBJECTS[0]
    yardstick = {"loss": 0.0, "de": 1e-2, "dc": 1e-2}

    def verdict(loss: float, de: float) -> str | None:
        result = {"errors": {"loss": loss, "de": de, "dc": 0.0}}
        return bench_cce.red(case, filtered, result, yardstick)

    assert verdict(0.0, 1.9e-2) is None
    assert verdict(0.0, 2.1e-2) is not None
    assert verdict(2e-2, 0.0) is not None
    assert verdict(float("nan"), 0.0) is not None
    assert verdict(0.0, float("nan")) is not None
