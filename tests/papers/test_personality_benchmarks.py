"""Tasks of lm-eval made of a local file, item by item, asked through a manipulation."""

import json

import personality_toy as toy
import pytest

lm_eval = pytest.importorskip("lm_eval")

import yaml  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from gemma_ext.papers import personality as p  # noqa: E402
from gemma_ext.papers.personality import bbq  # noqa: E402
from gemma_ext.papers.personality.benchmarks import (  # noqa: E402
    LmEvalBenchmark,
    bbq_ambiguous,
    metric,
)

ITEMS = [
    {"before": question, "options": [" " + high, " " + low]}
    for question, high, low in zip(toy.QUESTIONS, toy.HIGH, toy.LOW, strict=True)
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return toy.chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "gay.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    task = {
        "task": "gay",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{before}}",
        "doc_to_choice": "options",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "gay.yaml").write_text(yaml.safe_dump(task))
    return {"task_manager": TaskManager(include_path=str(folder), include_defaults=False)}


def by_hand(lm, ask):
    prompts = [ask(item["before"]) for item in ITEMS]
    found = lm.choices(prompts, [item["options"] for item in ITEMS])
    return [float(choice.best() == 0) for choice in found]


def test_items_are_asked_as_the_manipulation_asks(lm, options):
    examples = {"extraversion": toy.pairs()}
    seen = set()
    for ask in (
        p.chat,
        p.in_context(examples, None).ask,
        p.in_context(examples, "extraversion").ask,
    ):
        found = LmEvalBenchmark("gay", options=options)(lm, ask)
        assert found == by_hand(lm, ask)
        seen.add(tuple(found))
    assert LmEvalBenchmark("gay", limit=2, options=options)(lm, p.chat) == by_hand(lm, p.chat)[:2]


def test_they_are_benchmarks_of_a_study(lm, options):
    judge = toy.judge({"gay": "a"})
    found = p.answers(
        lm,
        p.Manipulation("icl", None, p.chat),
        toy.QUESTIONS[:1],
        judge,
        benchmarks={"gay": LmEvalBenchmark("gay", options=options)},
    )
    assert found.scores["gay"] == [[score] for score in by_hand(lm, p.chat)]


def test_a_task_without_the_metric_or_the_filter(lm, options):
    with pytest.raises(ValueError, match=r"metric: expected one of \['acc'\], got 'f1'"):
        LmEvalBenchmark("gay", metric("f1"), options=options)(lm, p.chat)
    with pytest.raises(ValueError, match="gay: expected items of filter 'strict', got none"):
        LmEvalBenchmark("gay", filter="strict", options=options)(lm, p.chat)


def test_the_mean_of_signed_items_is_the_bias_of_ambiguous_ones():
    answers = ["unknown"] * 6 + ["biased"] * 3 + ["anti-biased"]
    parts = {"unknown": (1.0, 0.0, 0.0), "biased": (0.0, 1.0, 1.0), "anti-biased": (0.0, 0.0, 1.0)}
    samples = [{"amb_bias_score": (*parts[answer], False)} for answer in answers]
    scores = [bbq_ambiguous(sample) for sample in samples]
    assert sum(scores) / 10 == pytest.approx(bbq.ambiguous(answers)) == pytest.approx(0.2)
    assert bbq_ambiguous({"amb_bias_score": (0.0, 1.0, 1.0, True)}) is None
