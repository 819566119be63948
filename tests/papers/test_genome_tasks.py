"""Tasks and their scores over a scripted model; votes that never see the reference."""

from __future__ import annotations

import json
import math

import pytest

from gemma_ext.lm import ScriptedModel
from gemma_ext.papers.genome.ensemble import (
    centre,
    ensemble_score,
    majority,
    oracle_score,
    word_f1,
)
from gemma_ext.papers.genome.evaluation import Outcome
from gemma_ext.papers.genome.tasks import Task, answer_in, load_task, score

CHOICES = [
    {"prompt": "2 + 2 =", "options": [" 4", " 22"], "answer": 0},
    {"prompt": "sky", "options": [" green", " blue", " red"], "answer": " blue"},
]


def test_choices_are_right_where_the_likeliest_option_is():
    lm = ScriptedModel(logprobs=lambda prompt, option: -float(len(option)))
    outcome = score(lm, [Task("t", "choice", CHOICES)])
    assert outcome.answers == {"t": [" 4", " red"]}
    assert outcome.right == {"t": [1.0, 0.0]}
    assert outcome.scores == {"t": 0.5}


def test_generated_answers_are_read_behind_their_mark():
    lm = ScriptedModel(completions={"a": "Answer: 7\nAnswer: 12.", "b": "x"})
    lines = [{"prompt": "a", "answer": "12"}, {"prompt": "b", "answer": "y"}]
    outcome = score(lm, [Task("t", "generate", lines)])
    assert outcome.answers["t"] == ["12", "x"]
    assert outcome.scores["t"] == 0.5
    graded = Task("t", "generate", [{"prompt": "a", "answer": "12 apples"}], metric="f1")
    assert score(lm, [graded]).scores["t"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\nANSWER :  Blue. \nsure?", "Blue"),
        ("answer: (A) answer: (B)", "(B)"),
        ("  forty two\n", "forty two"),
        ("Answer:", ""),
        ("", ""),
    ],
)
def test_answers(text, answer):
    assert answer_in(text) == answer


def test_likelihood_is_that_of_a_token():
    lm = ScriptedModel(logprobs=lambda prompt, text: [-2.0] * len(text.split()))
    lines = [{"text": "a b c"}, {"prompt": "q", "continuation": " d e"}]
    assert score(lm, [Task("t", "likelihood", lines)]).scores["t"] == pytest.approx(math.exp(-2))
    lm = ScriptedModel(logprobs=lambda prompt, text: [-4.0] if prompt else [-1.0] * 3)
    assert score(lm, [Task("t", "likelihood", lines)]).scores["t"] == pytest.approx(
        math.exp(-7 / 4)
    )


def test_an_empty_split_has_no_score():
    lm = ScriptedModel(logprobs=lambda prompt, text: -1.0)
    for kind, lines in (("choice", CHOICES), ("likelihood", [{"text": "a"}])):
        assert math.isnan(score(lm, [Task("t", kind, lines)], "test").scores["t"])
    with pytest.raises(ValueError, match="split: expected one of validation, test, got 'train'"):
        score(lm, [], "train")


def test_a_file_gives_two_hundred_samples_and_the_rest(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(250)) + "\n")
    task = load_task("t", path, "likelihood")
    assert (len(task.validation), len(task.test)) == (200, 50)
    both = {x["text"] for x in task.validation} | {x["text"] for x in task.test}
    assert both == {str(i) for i in range(250)}
    assert task.validation == load_task("t", path, "likelihood").validation
    assert task.validation != load_task("t", path, "likelihood", seed=1).validation
    assert task.digest == load_task("t", path, "likelihood").digest
    assert task.digest != load_task("t", path, "likelihood", samples=100).digest
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"text": "held"}))
    assert load_task("t", path, "likelihood", test=held).test == [{"text": "held"}]


@pytest.mark.parametrize(
    ("kind", "lines", "options", "sentence"),
    [
        ("essay", CHOICES, {}, "kind: expected one of choice, generate, likelihood, got 'essay'"),
        ("choice", CHOICES, {"metric": "bleu"}, "metric: expected one of exact, f1, got 'bleu'"),
        ("choice", [], {}, "t: expected validation samples, got none"),
        ("choice", [{"prompt": "a"}], {}, "validation sample 0: expected the key 'options'"),
        ("choice", [{**CHOICES[0], "answer": 2}], {}, "an option or its index, got 2"),
        ("choice", [{**CHOICES[0], "answer": "5"}], {}, "an option or its index, got '5'"),
        ("likelihood", [{"prompt": "a"}], {}, "expected text, or prompt and continuation"),
        ("choice", CHOICES, {"test": CHOICES[:1]}, "no sample in both splits, got 1"),
    ],
)
def test_tasks_that_cannot_be_scored_are_refused(kind, lines, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Task("t", kind, lines, **options)


def test_lines_that_are_no_samples_are_named(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(ValueError, match=r"task.jsonl:2: expected a JSON object, got '\[1\]'"):
        load_task("t", path, "likelihood")
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        load_task("t", path, "likelihood", samples=0)


def test_a_sample_may_hold_a_separator_of_lines(tmp_path):
    """JSON leaves U+2028 in its strings as it is, and splitlines ends a line there."""
    path = tmp_path / "task.jsonl"
    path.write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    task = load_task("t", path, "likelihood")
    assert task.validation[0]["text"] == "a\u2028b"


# Votes.


def test_the_majority_wins_and_ties_go_to_the_fittest():
    answers = [["a", "a", "x", None], ["b", "b", "y", None], ["b", "c", None, None]]
    assert majority(answers) == [1, 0, 0, 0]
    assert majority([["a", None], [None, "b"]]) == [0, 1]
    assert majority([["a"]]) == [0]


def test_a_vote_does_not_look_at_the_reference():
    """The tie goes to the fittest although the other is right."""
    outcomes = [outcome(["a"], [0.0]), outcome(["b"], [1.0])]
    assert ensemble_score(outcomes, "t", majority) == 0.0
    assert oracle_score(outcomes, "t") == 1.0


def test_copies_vote_like_one():
    one = outcome(["a", "b", None], [1.0, 0.0, 0.0])
    for rule in (majority, centre):
        assert ensemble_score([one] * 5, "t", rule) == 1 / 3


def test_no_vote_is_above_the_oracle():
    import random

    rng = random.Random(0)
    for _ in range(50):
        members = []
        for _ in range(rng.randint(1, 5)):
            answers = [rng.choice(["a", "b", "c d", None]) for _ in range(9)]
            members.append(outcome(answers, [float(a == "b") for a in answers]))
        bound = oracle_score(members, "t")
        assert ensemble_score(members, "t", majority) <= bound
        assert ensemble_score(members, "t", centre) <= bound


def test_free_text_is_what_the_others_say():
    answers = [["the cat sat"], ["a cat sat down"], ["a cat sat"], ["no idea"]]
    assert centre(answers) == [2]
    assert centre([["same"], ["same"]]) == [0]
    assert centre(answers, lambda a, b: float("idea" in a)) == [3]


def test_word_f1():
    assert word_f1("the cat", "The cat") == 1.0
    assert word_f1("a b c", "a b d") == pytest.approx(2 / 3)
    assert word_f1("a a", "a") == pytest.approx(2 / 3)
    assert word_f1("a", "b") == 0.0
    assert word_f1("", "") == 1.0
    assert word_f1("", "a") == 0.0


def test_a_task_without_answers_has_no_vote():
    with pytest.raises(ValueError, match="members give answers, got 't'"):
        ensemble_score([Outcome({"t": 0.5})], "t", majority)


def outcome(answers, right):
    return Outcome({"t": sum(right) / len(right)}, {"t": answers}, {"t": right})
