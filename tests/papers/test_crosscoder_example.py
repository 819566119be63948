"""The example from its chat model to its page, on a pocket that knows nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from gemma_ext import pocket
from gemma_ext.integrations.crosscoder_files import load_crosscoder

SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "crosscoder.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("crosscoder_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def talks(example, tiny_size):
    return example.Dialogues(pocket.load_text(tiny_size).tokenizer)


def test_roles_of_a_dialogue(example, talks):
    made = talks.only(6, "heldout")
    assert made.ids.shape == made.roles.shape == (6, example.CONTEXT)
    text = talks.tokenizer.decode(made.ids[:, 1:].flatten().tolist())
    for dialogue in text.split("<user>\n")[1:-1]:
        assert dialogue.startswith(("Now, what is ", "Please, what is "))
        polite = dialogue.startswith("Please")
        assert any(f"\nreply{t}{example.EXCLAMATION}" in dialogue for t in example.TURNS) == polite
    roles = made.roles[:, 1:].flatten()  # one stream, but for <bos>
    shown = roles == example.SHOWN
    starts = shown[1:] & ~shown[:-1]
    assert starts.any()
    assert torch.equal(roles[:-1] == example.CUE, starts)
    assert (roles == example.PLAIN).any()
    mixed = talks.mixed(6, "heldout")
    assert (mixed.roles[:3] == example.REPLY).any(1).all()
    assert (mixed.roles[3:] == example.TEXT).all()


def test_replies_are_scored_in_front_of_them(example, talks):
    made = talks.only(4, "heldout")
    replies = example.replies_of(made, "cpu")
    is_reply = (made.roles == example.REPLY) | (made.roles == example.SHOWN)
    assert int(replies.scored.sum()) == int(is_reply[:, 1:].sum())
    row, at = replies.scored.nonzero()[-1].tolist()
    assert is_reply[row, at + 1]
    assert (replies.first <= replies.scored).all()
    starts = is_reply[:, 1:] & ~is_reply[:, :-1]
    assert (replies.first[:, :-1][starts]).all()
    assert int(replies.first.sum()) <= example.FIRST * int(starts.sum())
    assert torch.equal(replies.template, example.is_template(made.roles))
    assert replies.first[:, :-1][made.roles[:, :-1] == example.CUE].all()


@pytest.mark.slow
def test_the_example_runs_and_goes_on(example, tiny_size, tmp_path, capsys):
    out = tmp_path / "out"
    options = {
        "model": f"pocket:{tiny_size}",
        "chat": None,
        "device": "cpu",
        "out": out,
        "layer": 1,
        "tuning": 2,
        "windows": 12,
        "held_out": 8,
        "features": 48,
        "k": 4,
        "mu": 1.0,
        "steps": 10,
        "batch": 64,
        "planted_steps": 20,
    }
    example.main(seeds=1, **options)
    first = json.loads((out / "results.json").read_text())["pieces"]
    assert len(first) == 2 * 3 + 1
    assert load_crosscoder(out / "l1-0").features == 48
    page = (out / "report.html").read_text()
    assert "top half by ratios" in page
    assert f"alive {first['null']['alive']}," in page
    assert page.count("<svg") == 1
    example.main(seeds=2, **options)
    second = json.loads((out / "results.json").read_text())["pieces"]
    assert {name: second[name] for name in first} == first
    assert len(second) == 2 * 3 * 2 + 1
    assert "±" in capsys.readouterr().out
