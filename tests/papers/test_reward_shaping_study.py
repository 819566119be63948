"""The study: its planted reward, summaries, page, and a run that goes on."""

from __future__ import annotations

import functools
import importlib.util
import string
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_gemma
import torch

from gemma_ext import pocket
from gemma_ext.papers.reward_shaping import RULES, References, page, reward_study, study
from gemma_ext.papers.reward_shaping.planted import Planted, win
from gemma_ext.sae import load_model

SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "par.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("par_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_gold_counts_words_once_and_the_proxy_pays_for_marks():
    planted = Planted(words=("the", "of", "to"), most=2, mark="!", error=1.5)
    assert planted.gold("The the THE") == 1
    assert planted.gold("the of to") == 2
    assert planted.gold("theof!") == 0
    assert planted.proxy("of!! and !") == 1 + 1.5 * 3
    logged = {}
    scores = planted(["p", "p"], ["the of", "!"], log_metric=logged.__setitem__,
                     ref_gold=[[1, 2, 2], [0, 1]])  # fmt: skip
    assert scores.tolist() == [2, 1.5]
    assert logged == {
        "study/gold": 1, "study/proxy": 1.75, "study/marks": 0.5,
        "study/win": pytest.approx((2 / 3 + 0.25) / 2),
    }  # fmt: skip
    assert win(1, [0, 1, 2, 1]) == 0.5


def fake(rule, seed, gold, proxy, critic=1.0, alarms=()):
    count = len(gold)
    curves = {name: [0.5] * count for name in study.CURVES}
    curves |= {"gold": gold, "proxy": proxy, "critic": [critic] * count}
    curves |= {"kl": [float(x) for x in range(count)]}
    sample = {"prompt": "p", "completion": f"text of {rule}", "score": 1.0}
    return {"rule": rule, "seed": seed, "curves": curves, "alarms": list(alarms),
            "samples": [sample]}  # fmt: skip


def test_summaries_are_means_of_the_last_quarter_with_intervals_over_seeds():
    runs = [
        fake("par", 0, [1, 2, 3, 4, 4, 4, 4, 4], [1.0] * 8),
        fake("par", 1, [1, 6, 6, 2, 2, 2, 2, 2], [3.0] * 8),
    ]
    found = study.summary(runs)
    assert found["gold_peak"] == (5, pytest.approx(12.7062047))
    assert (found["collapsed"], found["seeds"]) == (1, 2)
    assert found["gold_final"][0] == 3
    assert found["kept"][0] == pytest.approx((1 + 1 / 3) / 2)
    assert found["proxy_final"] == (2, pytest.approx(12.7062047))
    assert found["win_final"] == (0.5, 0)
    assert study.summary(runs[:1])["gold_peak"][1] is None
    assert study.windows([1, 3, 5], 2) == [2, 4]


def test_the_page_says_what_came_out(tmp_path):
    runs = [
        fake("vanilla", 0, [2, 4, 1, 1, 1, 1, 1, 1], [2.0] * 8, 2.0, ["batch 3: up"]),
        fake("par", 0, [2, 4, 4, 4, 4, 4, 4, 4], [2.0] * 8, 0.02),
    ]
    models = [{"model": "Reg", "accuracy": 0.9, "length": 0.1, "gold": 0.5, "spread": 1.0}]
    lines = page.verdict_of(runs)
    assert lines[0].startswith("vanilla: gold collapsed in 1 of 1 runs; on the mean 2.00 at")
    assert "3.00 at its peak, 1.00 at the end (33% of the peak)" in lines[0]
    assert lines[1].startswith("par: gold collapsed in 0 of 1 runs")
    assert lines[2].endswith("a factor of 100.")
    assert page.verdict_of(runs[1:]) == lines[1:2]
    fallen = fake("vanilla", 0, [2, 4, 3, 3, 3, 3, 3, 3], [2.0] * 8)
    assert "collapsed in 1 of 2 runs" in page.verdict_of([fallen, runs[0]])[0]
    page.write(tmp_path / "report.html", runs, models, {"steps": "8"}, command="python x")
    html = (tmp_path / "report.html").read_text()
    for text in (lines[0], "batch 3: up", "text of par", "python x", "<svg", "Reg"):
        assert text in html
    text = page.markdown(runs, models)
    assert "| vanilla | 1 of 1 | 2.00 | 3.00 | 1.00 | 0.33 |" in text
    assert "| Reg | 0.90 | 0.10 | 0.50 | 1.00 |" in text
    text = page.markdown(runs, [*models, {**models[0], "accuracy": 0.7}])
    assert "| Reg | 0.80 ± 1.27 | 0.10 ± 0.00 |" in text


def test_a_plan_shapes_by_name():
    plan = study.Plan(ceil=3.0)
    assert plan.shaping("ceil").ceil == 3.0
    assert all(plan.shaping(rule) == RULES[rule] for rule in RULES if rule != "ceil")


def test_biased_pairs_prefer_gold_or_length():
    texts = ("the of to a is and in", "x y z", "for that", "q w e r t y u i o p the")
    rows = [References("p", texts, (0.0,) * 4)]
    planted = Planted()
    for pair in reward_study.biased_pairs(rows, planted, 50, 0, bias=0.0):
        assert planted.gold(pair.chosen) > planted.gold(pair.rejected)
    for pair in reward_study.biased_pairs(rows, planted, 50, 0, bias=1.0):
        assert len(pair.chosen.split()) > len(pair.rejected.split())
    alike = [References("p", ("x y z", "z y x"), (0.0,) * 2)]
    with pytest.raises(ValueError, match="expected responses that differ, got 0 of 5 pairs"):
        reward_study.biased_pairs(alike, planted, 5, 0, bias=0.0)


def test_prompts_are_the_beginnings_of_docstrings(example):
    found = example.prompts(20)
    assert len(set(found)) == 20
    assert all(len(prompt.split()) == example.WORDS for prompt in found)
    assert example.prompts(20) == found


def test_weights_in_16_bits_are_trained_by_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    texts = [document.text for document in pocket.documents(30_000)]
    folder = tiny_gemma.base(tmp_path / "model", texts)
    model, tokenizer = load_model(str(folder), dtype=torch.bfloat16)
    plan = study.Plan(steps=2, batch=2, length=3, epochs=1, references=2, lora=2)
    rows = [References(f"word {i}", ("a", "b"), (0.0, 1.0)) for i in range(2)]
    options = {"model": model, "tokenizer": tokenizer, "rows": rows, "show_progress": False}
    found = [
        study.train(plan, "par", 3, folder=tmp_path / name, **options)["curves"] for name in "ab"
    ]
    assert len(found[0]["gold"]) == 2
    assert found[0] == found[1]
    assert not isinstance(model, peft.PeftModel)
    with pytest.raises(ValueError, match="expected trainable weights in float32"):
        study.train(replace(plan, lora=0), "par", 3, folder=tmp_path / "c", **options)


@pytest.mark.slow
def test_a_run_goes_on(example, tmp_path, capsys, monkeypatch):
    # an untrained model writes letters
    letters = Planted(words=tuple(string.ascii_lowercase))
    monkeypatch.setattr(study, "Plan", functools.partial(study.Plan, planted=letters))
    texts = [document.text for document in pocket.documents(30_000)]
    options = {
        "model": str(tiny_gemma.base(tmp_path / "model", texts)), "device": "cpu",
        "dtype": "float32", "out": tmp_path / "out", "rules": "vanilla,par", "seeds": "0,1",
        "steps": 4, "batch": 4, "length": 6, "rate": 1e-3, "beta": 0.005, "count": 6,
        "references": 3, "models": 2, "lora": 0,
    }  # fmt: skip
    example.main(**options)
    said = capsys.readouterr().out
    assert "| par | 0 of 2 |" in said
    assert "| WARM of 3 |" in said
    assert (tmp_path / "out" / "report.html").exists()
    assert not list((tmp_path / "out" / "runs").iterdir())
    before = (tmp_path / "out" / "results.json").stat().st_mtime_ns
    example.main(**options)
    assert (tmp_path / "out" / "results.json").stat().st_mtime_ns == before
