"""The example from its experts to its page, on a pocket that knows nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "genome.py"
pytestmark = pytest.mark.slow


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("genome_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_runs_and_goes_on(example, tiny_size, tmp_path, capsys):
    options = {
        "model": f"pocket:{tiny_size}",
        "device": "cpu",
        "out": tmp_path / "out",
        "method": "genome+",
        "budget": 12,
        "population": 6,
        "steps": 1,
        "batch": 2,
        "samples": 9,
        "test_samples": 9,
        "workers": 0,
    }
    example.main(seeds=1, **options)
    first = (tmp_path / "out" / "genome+-12-9" / "seed-0" / "results.json").read_text()
    rows = json.loads(first)
    assert [row["method"] for row in rows][:2] == ["genome+", "best parent"]
    assert all(row["used"] <= 12 for row in rows)
    experts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "experts").iterdir()}
    example.main(seeds=2, **options)
    assert (tmp_path / "out" / "genome+-12-9" / "seed-0" / "results.json").read_text() == first
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "experts").iterdir()}
    assert after == experts
    assert "±" in capsys.readouterr().out


def test_no_sample_is_on_two_sides(example):
    trained = {x for name in example.SLICES for x in example.pieces(name, example.TRAINING)}
    validation, test = set(), set()
    for seed in (0, 1):
        tasks = example.mixed_tasks(50, 90, seed)
        sizes = [(task.name, len(task.validation), len(task.test)) for task in tasks]
        assert sizes == [("asyncio", 16, 30), ("email", 16, 30), ("docstrings", 16, 30)]
        validation |= {x["text"] for task in tasks for x in task.validation}
        test |= {x["text"] for task in tasks for x in task.test}
    assert not trained & validation
    assert not trained & test
    assert not validation & test
    assert example.mixed_tasks(50, 90, 0) == example.mixed_tasks(50, 90, 0)
    assert example.mixed_tasks(50, 90, 1) != example.mixed_tasks(50, 90, 0)
    assert example.cut("short\n") == []


def test_rows_of_a_real_model_begin_as_its_texts_do(example, tmp_path, monkeypatch):
    import tiny_gemma
    import transformers

    folder = tiny_gemma.base(tmp_path / "model", ["def main(self):\n    return self.name\n"])
    seen = []

    class Trainer(transformers.Trainer):
        def train(self):
            seen.append(self.train_dataset[0]["input_ids"])

    monkeypatch.setattr(transformers, "Trainer", Trainer)
    begin = transformers.AutoTokenizer.from_pretrained(folder).bos_token_id
    for real in (True, False):
        out = tmp_path / str(real)
        example.train_expert(folder, "asyncio", out, 1, 1, "cpu", real)
    assert seen[0].tolist() == [begin, *seen[1].tolist()]
