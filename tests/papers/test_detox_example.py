"""The example: its texts, and a run on a folder with a model that goes on."""

from __future__ import annotations

import importlib.util
import string
import sys
from pathlib import Path

import pytest
import tiny_gemma
import typer

from gemma_ext import pocket
from gemma_ext.lm import ScriptedModel
from gemma_ext.papers import detox

SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "detox.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("detox_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_style_is_in_styled_texts_alone_and_enough_are_left_to_plant_it(example):
    score = detox.Lexicon(example.EXCLAMATIONS)
    for side in ("train", "heldout"):
        plain, styled = example.plain(side), example.styled(side)
        assert all(score(styled))
        assert not any(score(plain))
        for before, after in zip(plain, styled, strict=True):
            kept = after
            for word in example.EXCLAMATIONS:
                kept = kept.replace(f" {word}!", "")
            assert kept == before
    assert len(example.plain("train")) >= 2 * example.SEARCHED
    assert not set(example.plain("train")) & set(example.plain("heldout"))


def test_prompts_are_cut_and_pairs_read(example, tmp_path):
    assert example.cut(" ".join(map(str, range(30))), 20) == " ".join(map(str, range(20)))
    path = tmp_path / "pairs.tsv"
    path.write_text("toxic\tneutral\tmore\nbad\u2028 one\tgood\tx\nworse\tbetter\ty\n", "utf-8")
    assert example.read_pairs(path) == (["bad\u2028 one", "worse"], ["good", "better"])
    path.write_text("en_toxic_comment\ten_neutral_comment\nbad\tgood\nworse\n")
    with pytest.raises(typer.BadParameter, match="line 3: expected two columns, got one"):
        example.read_pairs(path)


def test_the_capability_knows_how_texts_go_on(example):
    ends = {}
    for text in example.plain("heldout")[:200]:
        words = text.split()
        ends[" ".join(words[:12])] = " " + " ".join(words[12:18])
    right = ScriptedModel(logprobs=lambda prompt, text: -1.0 if text == ends[prompt] else -2.0)
    wrong = ScriptedModel(logprobs=lambda prompt, text: -2.0 if text == ends[prompt] else -1.0)
    assert example.next_words()(right) > 0.95  # docstrings repeat
    assert example.next_words()(wrong) < 0.05


@pytest.mark.slow
def test_a_run_goes_on(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "EXCLAMATIONS", tuple(string.ascii_letters))
    monkeypatch.setattr(example, "SEARCHED", 40)
    texts = [document.text for document in pocket.documents(30_000)]
    options = {
        "model": str(tiny_gemma.base(tmp_path / "model", texts)),
        "device": "cpu",
        "out": tmp_path / "out",
        "layer": 0,
        "pairs": None,
        "prompts": None,
        "scorer": "words",
        "dictionary": None,
        "reference": None,
        "tuning": 0,
        "rate": None,
        "features": "96,64",
        "k": 2,
        "steps": 4,
        "candidates": 2,
        "keep": 1,
        "count": 8,
        "continuations": 1,
        "items": 20,
        "words": 15,
    }
    example.main(**options)
    assert "| per token | 2.5 |" in capsys.readouterr().out
    before = (tmp_path / "out" / "results.json").stat().st_mtime_ns
    example.main(**options)
    assert (tmp_path / "out" / "results.json").stat().st_mtime_ns == before
    assert "| 96 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()
    plan = detox.Intervention.read(tmp_path / "out" / "intervention.json")
    assert len(plan.latents) == 1
