"""Scores of lm-eval's tasks through the language model protocol, on tasks of local files."""

from __future__ import annotations

import json

import pytest
import tiny_gemma
import yaml

from gemma_ext import pocket
from gemma_ext.papers.mergebench import LmEval

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

from gemma_ext.lm.harness import GemmaExtLM  # noqa: E402

TASKS = ("words", "lines")
ACCURACY, PERPLEXITY = "acc,none", "byte_perplexity,none"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(model, tokenizer, task manager)"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = tmp_path_factory.mktemp("tasks")
    texts = [document.text for document in pocket.documents(30_000)]
    folder = tiny_gemma.base(place / "model", texts)
    lines = [x for text in texts for x in text.splitlines() if len(x.split()) > 3][:24]
    for number, name in enumerate(TASKS):
        records = [
            {"before": x[:9], "options": [x[9:], x[:8:-1]]} for x in lines[12 * number :][:12]
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(place / f"{name}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{before}}",
            "doc_to_choice": "options",
            "doc_to_target": 0,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        (place / f"{name}.yaml").write_text(yaml.safe_dump(task))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    manager = TaskManager(include_path=str(place), include_defaults=False)
    return model, AutoTokenizer.from_pretrained(folder), manager


def scorer(loaded, **options):
    _, tokenizer, manager = loaded
    sides = {
        "validation": {"words": ACCURACY},
        "test": {"words": ACCURACY, "lines": "acc_norm,none"},
    }
    given = {"task_manager": manager, "bootstrap_iters": 0}
    return LmEval(tokenizer, {"code": sides}, {"lines": ACCURACY}, options=given, **options)


def test_scores_are_those_of_lm_eval(loaded):
    model, tokenizer, manager = loaded
    found = lm_eval.simple_evaluate(
        GemmaExtLM(model, tokenizer=tokenizer, show_progress=False),
        tasks=list(TASKS),
        task_manager=manager,
        bootstrap_iters=0,
    )["results"]
    ours = scorer(loaded)
    words, lines = found["words"][ACCURACY], found["lines"]["acc_norm,none"]
    assert 0 < words + lines < 2
    assert ours.domains == ["code"]
    assert ours.score(model, "validation") == {"code": words}
    assert ours.score(model, "test", ["code"]) == {"code": pytest.approx((words + lines) / 2)}
    assert ours.general(model) == {"lines": found["lines"][ACCURACY]}


def test_rates_that_should_fall_are_turned_and_examples_limited(loaded):
    model, *_ = loaded
    rate = scorer(loaded, limit=5).general(model)["lines"]
    assert rate * 5 == pytest.approx(round(rate * 5))
    turned = scorer(loaded, limit=5, falling=frozenset({ACCURACY})).general(model)["lines"]
    assert turned == pytest.approx(1 - rate)


def test_a_metric_that_a_task_does_not_report(loaded):
    model, tokenizer, manager = loaded
    odd = LmEval(tokenizer, {}, {"lines": PERPLEXITY}, limit=1, options={"task_manager": manager})
    with pytest.raises(ValueError, match=f"expected lines to report {PERPLEXITY}, got"):
        odd.general(model)
