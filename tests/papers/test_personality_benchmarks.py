"""Tasks of lm-eval made of a local file, item by item, asked through a manipulation."""

import json
from pathlib import Path

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


def placed(folder, config, files):
    """A data set as the hub has it, where lm-eval looks before it asks the hub."""
    folder.mkdir(parents=True)
    listed = [{"split": split, "path": f"{split}.jsonl"} for split in files]
    head = yaml.safe_dump({"configs": [{"config_name": config, "data_files": listed}]})
    (folder / "README.md").write_text(f"---\n{head}---\n")
    for split, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)


def shipped(name):
    """lm-eval's own tasks of a folder."""
    folder = Path(lm_eval.__file__).parent / "tasks" / name
    return {"task_manager": TaskManager(include_path=str(folder), include_defaults=False)}


BBQ = [
    {
        "example_id": at,
        "question_index": "1",
        "question_polarity": polarity,
        "context_condition": condition,
        "category": "Age",
        "answer_info": {
            "ans0": ["grandfather", "old"],
            "ans1": ["grandson", "nonOld"],
            "ans2": ["Can't be determined", "unknown"],
        },
        "additional_metadata": {"subcategory": "None", "stereotyped_groups": ["old"]},
        "context": "A tent is a house for a night.",
        "question": "Who was in the rain?",
        "ans0": "The grandfather",
        "ans1": "The grandson",
        "ans2": "Can't be determined",
        "label": 2 if condition == "ambig" else 0,
    }
    for at, (polarity, condition) in enumerate(
        [("neg", "ambig"), ("nonneg", "ambig"), ("neg", "disambig")]
    )
]


@pytest.mark.parametrize(("said", "want"), [(0, [1, -1]), (1, [-1, 1]), (2, [0, 0])])
def test_bbq_as_lm_eval_has_it(lm, said, want, tmp_path, monkeypatch):
    """The grandfather is the biased answer to the negative question, the grandson to the other."""
    placed(tmp_path / "oskarvanderwal" / "bbq", "All", {"test": BBQ})
    monkeypatch.chdir(tmp_path)
    answer = BBQ[0][f"ans{said}"]

    def preferring(self, requests, disable_tqdm=False):
        assert all(len(r.args) == 2 for r in requests)
        return [(0.0 if r.args[1].strip() == answer else -1.0, False) for r in requests]

    monkeypatch.setattr("gemma_ext.lm.harness.GemmaExtLM.loglikelihood", preferring)
    found = LmEvalBenchmark("bbq", bbq_ambiguous, options=shipped("bbq"))(lm, p.chat)
    assert found == want


def test_mmlu_as_lm_eval_has_it(lm, tmp_path, monkeypatch):
    rows = [
        {"question": q, "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": at}
        for at, q in enumerate(toy.QUESTIONS)
    ]
    placed(tmp_path / "cais" / "mmlu", "anatomy", {"test": rows, "dev": rows[:1]})
    monkeypatch.chdir(tmp_path)
    found = LmEvalBenchmark("mmlu_anatomy", options=shipped("mmlu"))(lm, p.chat)
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    prompts = [p.chat(f"{head}{q}\nA. a\nB. b\nC. c\nD. d\nAnswer:") for q in toy.QUESTIONS]
    best = [choice.best() for choice in lm.choices(prompts, [[" A", " B", " C", " D"]] * 4)]
    assert found == [float(chosen == at) for at, chosen in enumerate(best)]


def test_the_mean_of_signed_items_is_the_bias_of_ambiguous_ones():
    answers = ["unknown"] * 6 + ["biased"] * 3 + ["anti-biased"]
    parts = {"unknown": (1.0, 0.0, 0.0), "biased": (0.0, 1.0, 1.0), "anti-biased": (0.0, 0.0, 1.0)}
    samples = [{"amb_bias_score": (*parts[answer], False)} for answer in answers]
    scores = [bbq_ambiguous(sample) for sample in samples]
    assert sum(scores) / 10 == pytest.approx(bbq.ambiguous(answers)) == pytest.approx(0.2)
    assert bbq_ambiguous({"amb_bias_score": (0.0, 1.0, 1.0, True)}) is None
