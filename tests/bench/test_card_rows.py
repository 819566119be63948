"""What the loss benchmark does for a card, as far as it needs none."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma_ext.bench import one_process, report, stages
from gemma_ext.bench.rows import compare_with_best
from gemma_ext.bench.subject import Case

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_cce
import cce_card
import cce_rows
import cce_stages
import profile_cce

CASE = Case(256, 128, 2048, "bf16", "plaw-2.5", device="cuda")


def measured(forward: float, total: float) -> list[dict[str, float]]:
    return [{"forward": forward, "total": total, "cpu": total}] * 3


def test_rows_are_compared_with_the_floor_and_the_best_peer():
    names = (cce_rows.FLOOR, "eager", "cut-ce", "cce")
    rows = {name: {**cce_rows.blank_row(CASE), "name": name} for name in names}
    timed = {
        "ceilings": {"gemm_fp32": 1.0, "gemm_bf16": 1.0, "copy": 1.0},
        "timings": {
            cce_rows.FLOOR: measured(0.010, 0.030),
            "eager": measured(0.050, 0.100),
            "cut-ce": measured(0.015, 0.040),
            "cce": measured(0.0125, 0.020),
        },
    }
    cce_rows.add_times(CASE, rows, timed)
    compare_with_best(rows, {"eager", "cut-ce"}, cce_rows.FLOOR)
    own = rows["cce"]
    assert own["of_floor_forward"] == pytest.approx(0.8)
    assert own["of_floor"] == pytest.approx(1.5)
    assert own["x_eager"] == pytest.approx(5)
    assert own["x_best"] == pytest.approx(2)
    assert rows["eager"]["x_best"] is None
    assert list(cce_rows.card_bars(CASE, "filtered", own)) == []  # too few rows for times
    text = report.table(list(rows.values()), cce_rows.columns_of("cuda"))
    assert "| 12.50  | 20.00      |" in text


@pytest.mark.parametrize(
    ("n", "kind", "row", "expected"),
    [
        (8192, "filtered", {"total": 0.0184, "x_best": 2.3, "of_floor_forward": 0.95}, [1, 1, 1]),
        (8192, "filtered", {"total": 0.0186, "x_best": 2.1, "of_floor_forward": 0.93}, [0, 0, 0]),
        (512, "filtered", {"total": 0.0037, "x_compile": 0.92, "of_floor_forward": 0.5}, [1]),
        (512, "filtered", {"total": 0.0037, "x_compile": 0.90, "of_floor_forward": 0.5}, [0]),
        (8192, "exact", {"total": 0.05, "of_floor": 0.71, "extra_mb": 299}, [1, 1]),
        (8192, "exact", {"total": 0.05, "of_floor": 0.70, "extra_mb": 301}, [0, 0]),
        (2048, "exact", {"total": 0.01, "of_floor": 0.76, "extra_mb": 299}, [0, 1]),
    ],
)
def test_bars_of_a_card(n, kind, row, expected):
    case = Case(n, 2304, 256000, "bf16", "plaw-2.5", device="cuda")
    found = cce_rows.card_bars(case, kind, cce_rows.blank_row(case) | row)
    assert [passed for _, passed in found] == list(map(bool, expected))


EFFORT = {"deadline": 200, "check_only": False, "seconds": 0, "least": 1, "warmup": 0}


def run_here(result: Path, *names: str, problem=cce_card.Head) -> dict:
    """What `one_process` finds on the CPU."""
    known = cce_stages.subjects()
    case = Case(64, 64, 1024, "fp32", "plaw-2.5", device="cpu")
    make = partial(problem, case, uncapped=False)
    one_process.run(result, [known[name] for name in names], make, **EFFORT)
    return stages.read(result)


def test_a_case_is_checked_and_written_down(tmp_path):
    """The same process on the CPU, with a peer that is not there."""
    found = run_here(tmp_path / "result.json", "eager", "cut-ce", "exact")
    notes = {row["name"]: row["note"] for row in found["rows"]}
    assert found["lost"] is None
    assert notes["exact"] == notes["eager"] == ""
    assert "needs a CUDA device" in notes["cut-ce"]
    timed = {row["name"] for row in found["rows"] if row["total"]}
    assert timed == {"eager", "exact", cce_rows.FLOOR}


class Breaking(cce_card.Head):
    def check(self, subject, row):
        raise RuntimeError("an illegal memory access\nwas encountered")


def test_a_subject_that_fails_is_a_row(tmp_path):
    found = run_here(tmp_path / "result.json", "exact", problem=Breaking)
    assert found["lost"] is None
    assert found["rows"][0]["note"] == "failed: RuntimeError: an illegal memory access"


def test_a_subject_that_breaks_the_card_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(one_process, "usable", lambda device: False)
    with pytest.raises(SystemExit):
        run_here(tmp_path / "result.json", "exact", problem=Breaking)
    assert stages.read(tmp_path / "result.json")["lost"] == "exact"


def test_a_retry_leaves_out_what_broke_the_card(monkeypatch, capsys):
    asked = []

    def card(self, folder, job, seconds):
        asked.append(job["names"][:])
        rows = [{**cce_rows.blank_row(CASE), "name": name} for name in job["names"]]
        lost = "cce" if "cce" in job["names"] else None
        return {"rows": rows, "yardstick": {"de": 1.0, "dc": 1.0}, "lost": lost}

    monkeypatch.setattr(stages.Stages, "card", card)
    chosen = [s for s in cce_stages.subjects().values() if s.name in ("cce", "eager")]
    rows = bench_cce.run_card_case(CASE, chosen, stages.Effort(1, 1, False, 1), 60)
    assert asked == [["eager", "cce"], ["eager"]]
    assert [row["name"] for row in rows] == ["eager", "cce"]


def test_peers_run_once_and_compile_where_a_bar_needs_it():
    known = cce_stages.subjects()

    def again(n: int) -> set[str]:
        case = Case(n, 2304, 256000, "bf16", "plaw-2.5", device="cuda")
        return {name for name, subject in known.items() if bench_cce.worth_again(subject, case)}

    own = {"cce", "exact", "auto", "reference", "lean", "lean-exact"}
    assert again(8192) == own
    assert again(512) == own | {"compile"}


def test_cases_of_a_card():
    nothing = argparse.Namespace(shape=None, dtype=None, data=None, device="cuda")
    assert bench_cce.card_cases(nothing)[0].label() == "N=8192 D=2304 V=256000 bf16 plaw-2.5"
    one = argparse.Namespace(shape=[(8, 16, 300)], dtype=None, data=["random-init"], device="cuda")
    assert [c.label() for c in bench_cce.card_cases(one)] == ["N=8 D=16 V=300 bf16 random-init"]


def test_folders_of_cards():
    assert report.card_slug("NVIDIA H200") == "nvidia-h200"
    assert report.card_slug("Tesla T4") == "nvidia-tesla-t4"


def test_a_profile_is_sorted_and_summed():
    name = "void gemma_ext::cce::cuda::forward_kernel<__nv_bfloat16, true>(ForwardParams)"
    events = [
        SimpleNamespace(key="aten::mul", count=9, self_device_time_total=0),
        SimpleNamespace(key="memset", count=3, self_device_time_total=3000),
        SimpleNamespace(key=name, count=6, self_device_time_total=9000),
    ]
    first, second, total = profile_cce.kernels(events)
    assert first["kernel"] == "forward_kernel<__nv_bfloat16, true>"
    assert (first["launches"], first["ms"], first["share"]) == (2, 3, 0.75)
    assert second["kernel"] == "memset"
    assert total["ms"] == 4
