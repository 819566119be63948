"""The example on a folder with a model: experts are made once, and a run goes on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import tiny_gemma

from gemma_ext import pocket

SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "mergebench.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("mergebench_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    texts = [document.text for document in pocket.documents(30_000)]
    return tiny_gemma.base(tmp_path_factory.mktemp("model"), texts)


def test_experts_learn_and_a_run_goes_on(example, folder, tmp_path, capsys):
    options = {
        "model": str(folder),
        "out": tmp_path / "out",
        "seeds": 1,
        "steps": 8,
        "rate": 1e-2,
        "context": 32,
        "windows": 4,
        "calibration": 4,
        "released": False,
        "device": "cpu",
    }
    example.main(only=["Model soup", "Fisher"], **options)
    printed = capsys.readouterr().out
    losses = [line for line in printed.splitlines() if "held-out loss" in line]
    assert len(losses) == len(pocket.DOMAINS)
    for line in losses:
        before, after = (float(words.split()[-1]) for words in line.split(","))
        assert after < before
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "experts").iterdir()}
    example.main(only=["Model soup", "Fisher", "RegMean++"], **options)
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "experts").iterdir()}
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    names = [json.loads(line)["algorithm"] for line in lines]
    assert names == ["base", "experts", "Model soup", "Fisher", "RegMean++"]
    assert "| Fisher |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "page.html").exists()


def test_windows_of_a_real_model_begin_as_its_texts_do(example, folder, tmp_path):
    recipe = example.ExpertRecipe(1, 1, 1e-3)
    makers = example.Makers(str(folder), tmp_path, recipe, 16, 3, "cpu", False)
    rows = makers.rows(makers.domain("gui").train)
    assert rows.shape[1] == 17
    assert (rows[:, 0] == makers.tokenizer.bos_token_id).all()
    assert makers.calibration("gui")[0].shape == (3, 17)
    assert makers.held_out(2).begin == makers.tokenizer.bos_token_id
