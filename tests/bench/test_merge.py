"""bench_merge: its figures, its recipes, and the yardstick of raw bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_merge  # noqa: E402
import merge_models  # noqa: E402


def options(*words: str):
    old, sys.argv = sys.argv, ["bench_merge.py", *words]
    try:
        return bench_merge.parse_options()
    finally:
        sys.argv = old


def run(wall: float, peak: float = 1e8) -> dict[str, float]:
    return {"wall": wall, "cpu": 2 * wall, "peak": peak}


def test_figures_are_paired_within_rounds():
    runs = {
        "raw": [run(1.0), run(2.0), run(4.0)],
        "mergekit": [run(10.0), run(12.0), run(40.0)],
        "gemma_ext": [run(1.1), run(3.0), run(4.0)],
    }
    row = bench_merge.row_of(options(), "ties", "gemma_ext")
    bench_merge.add_figures(row, runs, "gemma_ext", moved=6_000_000_000)
    assert row["wall"] == 3.0
    assert row["cpu"] == 6.0
    assert row["rate"] == pytest.approx(2.0)
    assert row["of_raw"] == pytest.approx(1.1)
    assert row["x_mergekit"] == pytest.approx(10 / 1.1)
    assert row["spread"] == pytest.approx((4.0 - 1.1) / 3.0)


@pytest.mark.parametrize(
    ("method", "of_raw", "faster", "peak", "expected"),
    [
        ("ties", 1.2, 3.5, 9e8, ["pass", "pass", "pass"]),
        ("ties", 1.3, 2.5, 1.2e9, ["MISS", "MISS", "MISS"]),
        ("linear", 1.2, 0.9, 9e8, ["pass", "pass"]),
        ("sce", None, None, 1.08e9, ["pass"]),
    ],
)
def test_bars(method, of_raw, faster, peak, expected):
    row = {"of_raw": of_raw, "x_mergekit": faster, "peak_mb": peak / 1e6}
    assert [text.split()[-1] for text in bench_merge.bars(method, row)] == expected


@pytest.mark.parametrize("method", bench_merge.PARAMETERS)
def test_recipes_are_ones_that_we_read(method, tmp_path):
    from gemma_ext.souping.recipes.recipe import parse_recipe

    sources = [tmp_path / name for name in ("base", "a", "b", "c")]
    recipe = parse_recipe(bench_merge.recipe_of(method, sources))
    assert recipe.method == method
    assert len(recipe.models()) == 3 + (method not in bench_merge.WITHOUT_BASE)


def test_shapes_are_those_of_gemma_2_2b():
    assert merge_models.model_bytes(26, 256000) == 2 * 2_614_341_888  # parameters of the real one
    names = merge_models.shapes(2, 100)
    assert len(names) == 2 + 2 * 11
    assert names["model.embed_tokens.weight"] == (100, 2304)


def test_generated_models_are_fine_tunes(tmp_path, monkeypatch):
    monkeypatch.setattr(merge_models, "HIDDEN", 40)
    monkeypatch.setattr(merge_models, "INTERMEDIATE", 50)
    monkeypatch.setattr(merge_models, "SHARD_BYTES", 5000)
    paths = merge_models.make_models(tmp_path, 2, 30, 2)
    models = [
        {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
        for path in paths
    ]
    base = models[0]["model.layers.1.mlp.up_proj.weight"].double()
    assert base.std() == pytest.approx(merge_models.BASE_STD, rel=0.1)
    changes = [m["model.layers.1.mlp.up_proj.weight"].double() - base for m in models[1:]]
    assert not torch.equal(*changes)
    for change in changes:
        assert change.std() == pytest.approx(merge_models.DELTA_STD, rel=0.1)
    again = merge_models.make_models(tmp_path, 2, 30, 2)
    assert again == paths


def test_raw_reads_all_and_writes_as_much(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i, size in enumerate((3_000_000, 7)):
            save_file({"w": torch.ones(size)}, tmp_path / name / f"{i}.safetensors")
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"sources": [str(tmp_path / n) for n in "ab"], "threads": 2}))
    command = [sys.executable, BENCHMARKS / "merge_subjects.py", "raw", job, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["wall"] > 0
    assert figures["peak"] > 8 << 20
    for i in range(2):
        last = (tmp_path / "b" / f"{i}.safetensors").read_bytes()
        assert (tmp_path / "out" / f"{i}.safetensors").read_bytes() == last
