"""States of a model; the example from them to its page, on a pocket that knows nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from gemma_ext import pocket
from gemma_ext.papers import atoms
from gemma_ext.papers.atoms.states import hidden_states
from gemma_ext.papers.atoms.study import known_world, sizes

SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "atoms.py"


def test_hidden_states_are_the_residual_stream(tiny):
    model = pocket.build_model(tiny).eval()
    ids = torch.randint(3, 400, (5, 9))
    ticks = []
    found = hidden_states(model, ids, [1, 0], batch=2, advance=ticks.append)
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[0], states[1][:, 1:].flatten(0, 1))
    assert found[1].shape == (40, 32)  # the last of `states` has been normalised
    assert ticks == [2, 2, 1]
    with pytest.raises(ValueError, match="site: expected a block below 2, got 2"):
        hidden_states(model, ids, [0, 2])


def test_sizes():
    assert sizes(640, 3, 8) == [10, 80, 640]


def test_only_the_atomic_product_finds_atoms_of_a_stretched_space():
    recipe = atoms.Recipe(64, 2, steps=600, batch=512, rate=1e-2)
    record = known_world(64, 32, 2, recipe, states=20_000)
    assert record["atomic"]["share"] > 0.7
    assert record["plain"]["share"] < 0.2
    assert record["random"]["share"] < 0.2
    assert record["atomic"]["r2_refit"] > 0.9


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("atoms_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_example_runs_and_goes_on(example, tiny_size, tmp_path, capsys):
    out = tmp_path / "out"
    options = {
        "model": f"pocket:{tiny_size}",
        "device": "cpu",
        "out": out,
        "layers": "all",
        "windows": 20,
        "held_out": 8,
        "ratio": 2,
        "active": 4.0,
        "steps": 10,
        "batch": 64,
        "moment": "centred",
        "norm": "plain",
        "scaling": 2,
    }
    example.main(**options)
    first = (out / "results.json").read_text()
    pieces = json.loads(first)["pieces"]
    assert {"layer 0", "layer 1"} <= set(pieces)
    assert len(pieces) == 2 + 4 + 2
    dictionary, facts = atoms.load(out / "layer-1")
    assert dictionary.atoms.shape == (64, 32)
    assert facts["q_star"] == pieces["layer 1"]["atoms"]["q_star"]
    assert sum(facts["k_hist"]) == 8 * 127
    page = (out / "report.html").read_text()
    assert "random dictionary" in page
    assert page.count("<svg") == 2
    example.main(**options)
    assert (out / "results.json").read_text() == first
    assert "principal axes" in capsys.readouterr().out
