"""What the loss benchmark does for a card, as far as it needs none."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma_ext.bench import report
from gemma_ext.bench.subject import Case

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_cce
import cce_card
import cce_rows
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
    cce_rows.compare_with_best(rows, {"eager", "cut-ce"})
    own = rows["cce"]
    assert own["of_floor_forward"] == pytest.approx(0.8)
    assert own["of_floor"] == pytest.approx(1.5)
    assert own["x_eager"] == pytest.approx(5)
    assert own["x_best"] == pytest.approx(2)
    assert rows["eager"]["x_best"] is None
    own["of_gradients"] = 0.005
    assert list(cce_rows.card_bars(CASE, "filtered", own)) == [
        ("forward 80% >= 85% of the bare product", False),
        ("2.00 >= 2.0x best peer", True),
        ("0.5% < 1% of gradients", True),
    ]
    text = report.table(list(rows.values()), cce_rows.columns_of("cuda"))
    assert "| 12.50  | 20.00      |" in text


def test_a_case_is_checked_and_written_down(tmp_path):
    """The same process on the CPU, with a peer that is not there."""
    result = tmp_path / "result.json"
    case = Case(64, 64, 1024, "fp32", "plaw-2.5", device="cpu")
    effort = {"deadline": 200, "check_only": False, "seconds": 0, "least": 1, "warmup": 0}
    cce_card.run(result, case, ["eager", "cut-ce", "exact"], **effort)
    found = bench_cce.read(result)
    notes = {row["name"]: row["note"] for row in found["rows"]}
    assert found["lost"] is None
    assert notes["exact"] == notes["eager"] == ""
    assert "needs a CUDA device" in notes["cut-ce"]
    timed = {row["name"] for row in found["rows"] if row["total"]}
    assert timed == {"eager", "exact", cce_rows.FLOOR}


def test_a_subject_that_breaks_the_card_is_named(tmp_path, monkeypatch):
    def breaks(*_):
        raise RuntimeError("an illegal memory access\nwas encountered")

    monkeypatch.setattr(cce_card, "check", breaks)
    monkeypatch.setattr(cce_card, "usable", lambda device: False)
    case = Case(64, 64, 1024, "fp32", "plaw-2.5", device="cpu")
    effort = {"deadline": 200, "check_only": False, "seconds": 0, "least": 1, "warmup": 0}
    with pytest.raises(SystemExit):
        cce_card.run(tmp_path / "result.json", case, ["exact"], **effort)
    found = bench_cce.read(tmp_path / "result.json")
    assert found["lost"] == "exact"
    assert found["rows"][0]["note"] == "failed: RuntimeError: an illegal memory access"


def test_a_retry_leaves_out_what_broke_the_card(monkeypatch, capsys):
    asked = []

    def stage(folder, case, names, effort, seconds):
        asked.append(list(names))
        rows = [{**cce_rows.blank_row(case), "name": name} for name in names]
        lost = "cce" if "cce" in names else None
        return {"rows": rows, "yardstick": {"de": 1.0, "dc": 1.0}, "lost": lost}

    monkeypatch.setattr(bench_cce, "card_stage", stage)
    chosen = [s for s in cce_card.cce_stages.subjects().values() if s.name in ("cce", "eager")]
    effort = bench_cce.Effort(1, 1, False, 1)
    rows = bench_cce.run_card_case(CASE, chosen, effort, 60)
    assert asked == [["eager", "cce"], ["eager"]]
    assert [row["name"] for row in rows] == ["eager", "cce"]


def test_cases_of_a_card():
    nothing = argparse.Namespace(shape=None, dtype=None, data=None)
    assert bench_cce.card_cases(nothing)[0].label() == "N=8192 D=2304 V=256000 bf16 plaw-2.5"
    one = argparse.Namespace(shape=[(8, 16, 300)], dtype=None, data=["random-init"])
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
