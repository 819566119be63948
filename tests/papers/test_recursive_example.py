"""The example from its conversions to its page, on a pocket that knows nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from gemma_ext.nn.recursive import Plan, load

SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "recursive_gemma.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("recursive_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


OPTIONS = {
    "ranks": "2,4",
    "steps": 1,
    "exit_steps": 1,
    "batch": 2,
    "context": 16,
    "held_out": 6,
}


def test_example_converts_trains_and_serves(example, tiny_size, tmp_path, capsys):
    out = tmp_path / "out"
    options = {"device": "cpu", "loops": 2, "seeds": 1, "full": False, "rate": 1e-3}
    options |= {"freeze": False, "rows": [], "requests": 3, **OPTIONS}
    example.main(model=f"pocket:{tiny_size}", out=out, serving=True, **options)
    printed = capsys.readouterr().out
    assert "| stepwise r=0 |" in printed
    html = (out / "report.html").read_text()
    assert "Served" in html
    assert "3 of 3" in html
    for name in ("r=0-0", "r=4-0"):
        model = load(out / "models" / name)
        assert Plan.of_model(model).loops == 2
        assert (out / "models" / name / "tokenizer.json").exists()
    record = json.loads((out / "results.json").read_text())
    count = len(record["pieces"])
    example.main(model=f"pocket:{tiny_size}", out=out, serving=False, **options)
    assert len(json.loads((out / "results.json").read_text())["pieces"]) == count


def test_only_the_rows_asked_for(example, tiny_size, tmp_path):
    options = {"device": "cpu", "loops": 2, "seeds": 1, "full": False, "rate": 1e-3}
    options |= {"freeze": True, "requests": 3, **OPTIONS}
    example.main(
        model=f"pocket:{tiny_size}",
        out=tmp_path,
        serving=False,
        rows=["stepwise r=0"],
        **options,
    )
    pieces = json.loads((tmp_path / "results.json").read_text())["pieces"]
    assert set(pieces) == {
        "start",
        "inits: stepwise r=0, seed 0",
        "teacher: stepwise r=0, forward_kl, seed 0",
    }


def test_windows_of_a_folder_are_of_the_pockets_text(example, tiny_size, tmp_path):
    model, tokenizer = example.load(f"pocket:{tiny_size}", "cpu")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, tokenizer = example.load(str(tmp_path), "cpu")
    rows = example.windows(str(tmp_path), tokenizer, "heldout", 3, 8)
    assert rows.shape == (3, 8)
    assert rows[0, 0] == tokenizer.bos_token_id
    assert not torch.equal(rows, example.windows(str(tmp_path), tokenizer, "train", 3, 8)[:3])
