"""The page, and the example on a folder with a model: its parts, and a run that goes on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_gemma

from gemma_ext import pocket
from gemma_ext.papers import personality as p
from gemma_ext.papers.personality import page

SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "personality.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("personality_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


def effect(method, trait, alignment, damage, adjusted):
    difference = p.Difference(damage, damage - 0.1, damage + 0.1, adjusted)
    return p.Effect(
        method,
        trait,
        p.Difference(alignment, alignment - 0.1, alignment + 0.2, None),
        0.95,
        {"mmlu": difference},
        {"mmlu": adjusted},
    )


def test_the_page_has_every_table_and_a_star_where_it_is_due(tmp_path):
    effects = [effect("icl", "gay", 0.5, -0.3, 0.01), effect("ms", "gay", 0.8, 0.0, 0.6)]
    levels = p.levels(p.stability_rows(effects))
    responses = {"icl": {"gay": {"gay": 0.5, "sad": -0.125}}}
    trials = {"gay": {0: [p.Trial(-1.0, 0.1, 1.0, 15), p.Trial(1.0, 0.9, 0.2, 15)]}}
    page.write(tmp_path / "page.html", trials, effects, responses, levels, {"model": "tiny"})
    html = (tmp_path / "page.html").read_text()
    text = page.markdown(effects, responses, levels)
    assert "| icl | gay | +0.500 [+0.400, +0.700] | 0.95 | -0.300 [-0.400, -0.200] * |" in text
    assert "| ms | gay | +0.800 [+0.700, +1.000] | 0.95 | +0.000 [-0.100, +0.100] |" in text
    assert "| icl | gay | +0.500 | -0.125 |" in text
    assert "| method | ms | 1.000 | 1.000 | 1.000 |" in text
    for part in ("-0.300 [-0.400, -0.200] *", "-0.125", "tiny", "by</", "ms, gay", "layer 0"):
        assert part in html
    assert html.count("<svg") == 2


def test_manners_are_told_apart_by_their_marks(example):
    for manner in example.MANNERS:
        assert example.manner_of(example.told("a list of names", manner)) == manner
        assert example.manner_of(example.begun("a list of names", manner)) == manner
    assert example.manner_of("a list of names") == "none"
    assert example.told("x", None) == "x"
    assert example.repeats("so so so so it")
    assert not example.repeats("so it goes so")


def test_pairs_dialogues_and_questions_are_of_different_names(example):
    world = example.manners(20, 3, 4)
    assert list(world.pairs) == list(example.OPPOSITES)
    learned = {pair.question for some in world.pairs.values() for pair in some}
    assert len(learned) == 20
    dialogues = example.dialogues(example.random.Random(0), example.ASIDE)
    lines = {line.removeprefix("Question: ") for text in dialogues for line in text.split("\n")}
    taught = {line for line in lines if line.startswith("What is")}
    asked = [*world.calibration, *world.questions]
    assert len(set(asked)) == 7
    assert not taught & {*learned, *asked}
    assert any("Answer (gloomy):" in text for text in dialogues)
    with pytest.raises(example.typer.BadParameter, match="expected at most 400 contrasts"):
        example.manners(401, 3, 4)


def test_a_table_of_pairs_is_a_world_too(example, tmp_path):
    made = [
        p.Pair(f"Question {at}?", "t", trait, trait, "One two three.", "low", "Four five.")
        for at in range(8)
        for trait in ("openness", "neuroticism")
    ]
    long = p.Pair("Question 0?", "t", "openness", "openness", "One " * 9, "low", "Four.")
    p.write_pairs(tmp_path / "pairs.csv", [*made, long])
    plain = SimpleNamespace(chat_template=None)
    world = example.big_five(tmp_path / "pairs.csv", 2, 3, plain)
    assert world.ask("x") == example.turn("x")
    assert list(world.calibration) == ["Question 3?", "Question 4?"]
    assert list(world.questions) == ["Question 5?", "Question 6?", "Question 7?"]
    assert {trait: len(some) for trait, some in world.pairs.items()} == {
        "openness": 3,
        "neuroticism": 3,
    }
    chat = SimpleNamespace(chat_template="x")
    assert example.big_five(tmp_path / "pairs.csv", 2, 3, chat).ask is p.chat
    with pytest.raises(example.typer.BadParameter, match="needs --classifier and --screen"):
        world.judge(None, None, None, "who", None)


@pytest.mark.slow
def test_a_run_goes_on(example, tmp_path, capsys):
    texts = [document.text for document in pocket.documents(30_000)]
    folder = tiny_gemma.base(tmp_path / "model", texts)
    options = {
        "model": str(folder),
        "device": "cpu",
        "out": tmp_path / "out",
        "layers": "0,1",
        "pairs": None,
        "classifier": None,
        "screen": None,
        "tasks": "",
        "tuning": 0,
        "contrasts": 4,
        "prompts": 2,
        "strengths": 3,
        "questions": 3,
        "samples": 1,
        "items": 4,
        "max_tokens": 4,
    }
    example.main(**options)
    first = capsys.readouterr().out
    assert "| steering, contrast | formal |" in first
    assert (tmp_path / "out" / "report.html").exists()
    before = (tmp_path / "out" / "results.json").stat().st_mtime_ns
    example.main(**options)
    assert (tmp_path / "out" / "results.json").stat().st_mtime_ns == before
    assert "| adapter | cheerful |" in capsys.readouterr().out
