"""Verdicts, monitors and references."""

from __future__ import annotations

import json
import math

import pytest
import torch

from gemma_ext.lm import Sampling, ScriptedModel
from gemma_ext.papers.reward_shaping import (
    HackingMonitor,
    References,
    add_columns,
    draw_references,
    fingerprint,
    read_references,
    read_study,
    verdict,
    win_rate,
)


def judge(verdicts):
    """Answers (first, second) pairs from a table."""

    def answer(prompt):
        first = prompt.split("Answer A:\n")[1].split("\n\nAnswer B:")[0]
        second = prompt.split("Answer B:\n")[1].split("\n\nGive")[0]
        return verdicts[first, second]

    return ScriptedModel(answer)


def test_win_rate_takes_both_orders_and_halves_ties():
    table = {
        ("good", "bad"): "Because.\nBetter: A", ("bad", "good"): "Better: B",
        ("same", "alike"): "Better: N", ("alike", "same"): "Better:A",
        ("x", "y"): "I cannot say", ("y", "x"): "Better: A",
        ("first", "wins"): "Better: A", ("wins", "first"): "Better: A",
    }  # fmt: skip
    ours, theirs = ["good", "same", "x", "first"], ["bad", "alike", "y", "wins"]
    found = win_rate(judge(table), ["{a}"] * 4, ours, theirs)
    assert found.points == (1.0, 0.25, None, 0.5)
    assert found.rate == pytest.approx(1.75 / 3)
    assert (found.prompts, found.unread) == (3, 1)
    spread = torch.tensor([1, 0.25, 0.5]).std() / math.sqrt(3)
    assert found.error == pytest.approx(float(spread))
    assert found.first == pytest.approx((1 + 0 + 0.5 + 1 + 1 + 1) / 6)
    swapped = win_rate(judge(table), ["{a}"] * 4, theirs, ours)
    assert swapped.rate == pytest.approx(1 - found.rate)


def test_verdicts():
    assert verdict("Better: B ... no.\nBetter:  N") == "N"
    assert verdict("better: A") is None
    # first letters are no verdict
    assert verdict("Better: Answer B") == verdict("Better: **B**") == "B"
    assert verdict("Better: Neither") == "N"
    assert verdict("Better: Both") is verdict("Better: All") is None
    assert math.isnan(win_rate(judge({("a", "b"): "Better: A", ("b", "a"): "Better: B"}), ["p"],
                               ["a"], ["b"]).error)  # fmt: skip
    with pytest.raises(ValueError, match="answers: expected 1 of both, got 1 and 0"):
        win_rate(ScriptedModel(), ["p"], ["a"], [])
    with pytest.raises(ValueError, match="judge: expected verdicts such as"):
        win_rate(ScriptedModel(lambda p: "hm"), ["p"], ["a"], ["b"])


def test_monitor_centres_on_references_and_alarms_once():
    monitor = HackingMonitor(alarm=3.0, stop_at=0.5)
    raw = torch.tensor([1.0, 2.0])
    found = monitor.update(raw, raw.sigmoid(), [[0.0, 2.0], []], [10, 20], kl=0.5)
    assert found["centred"] == 1.0  # an empty row is compared with 0
    assert found["length_drift"] == 0
    assert found["saturated"] == 0
    assert not monitor.alarms
    members = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    found = monitor.update(raw + 5, None, [[0.0], [0.0]], [30, 30], kl=2.0, members=members)
    assert found["centred"] == 6.5
    assert found["length_drift"] == 1.0
    assert found["disagreement"] == pytest.approx(math.sqrt(2) / 2)
    assert found["saturated"] == 1
    assert monitor.stop
    assert len(monitor.alarms) == 2
    assert "batch 2: the mean centred reward is 6.50, above 3" in monitor.alarms
    monitor.update(raw + 9)
    assert len(monitor.alarms) == 2
    assert monitor.curve() == ([0.5, 2.0], [1.0, 6.5])
    fresh = HackingMonitor()
    fresh.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert fresh.state_dict() == monitor.state_dict()


def test_monitor_without_references_centres_on_its_first_batch():
    monitor = HackingMonitor()
    assert monitor.update(torch.tensor([3.0, 5.0]))["centred"] == 0
    assert monitor.update(torch.tensor([8.5]))["centred"] == 4.5
    assert monitor.update(torch.zeros(0)) == {}
    with pytest.raises(ValueError, match="saturation: expected a share"):
        HackingMonitor(saturation=1.0)


def score(prompts, completions, **columns):
    return torch.tensor([float(len(p) + 10 * len(c)) for p, c in zip(prompts, completions,
                                                                     strict=True)])  # fmt: skip


def test_references_are_drawn_scored_kept_and_go_on(tmp_path):
    policy = ScriptedModel(lambda prompt: f"{prompt} and more")
    path, name = tmp_path / "refs.jsonl", fingerprint("sft", "rm", count=3)
    options = {"count": 3, "batch": 2, "show_progress": False}
    drawn = draw_references(["a", "bb", "a"], policy, score, path, name, **options)
    assert drawn[0] is drawn[2]
    assert drawn[0].completions == ("a and more",) * 3
    assert drawn[0].rewards == (1 + 100.0,) * 3
    assert drawn[0].lengths == (4, 4, 4)  # three words and the end, as in a rollout
    with pytest.raises(ValueError, match="expected finite scores, got nan for 'c and more'"):
        draw_references(
            ["c"],
            policy,
            lambda prompts, completions: [math.nan] * len(prompts),
            path,
            name,
            **options,
        )
    assert read_references(path, name) == list(drawn[:2])
    asked = len(policy.asked)
    more = draw_references(["bb", "c"], policy, score, path, name, **options)
    assert len(policy.asked) == asked + 3
    assert more[0] == drawn[1]
    assert read_references(path, name) == [drawn[0], drawn[1], more[1]]
    odd = draw_references(["line\u2028or\u0085lines"], policy, score, path, name, **options)
    assert read_references(path, name)[3:] == odd
    assert not list(tmp_path.glob("*.tmp"))


def test_stale_references_are_refused(tmp_path):
    policy, path = ScriptedModel(lambda prompt: "x"), tmp_path / "refs.jsonl"
    base = {"policy": "sft", "reward": "rm", "sampling": Sampling(), "count": 1, "template": "t"}
    draw_references(["a"], policy, score, path, fingerprint(**base), count=1, show_progress=False)
    for change in (
        {"policy": "sft2"}, {"reward": "rm2"}, {"sampling": Sampling(temperature=0.9)},
        {"count": 2}, {"template": None},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="got stale ones of"):
            draw_references(["a"], policy, score, path, fingerprint(**{**base, **change}), count=1)
    with pytest.raises(ValueError, match="count: expected at least 1"):
        draw_references(["a"], policy, score, path, "x", count=0)


def test_the_penalty_of_rollouts_is_that_of_references():
    row = References("p", ("a", "b"), (1.0, 2.0), (300, 350))
    assert row.penalised((300, 0.01)) == (1.0, 1.5)
    assert row.penalised(None) == (1.0, 2.0)
    with pytest.raises(ValueError, match="references: expected lengths of 'p', got none"):
        References("p", ("a",), (1.0,)).penalised((300, 0.01))


def test_the_file_of_the_study(tmp_path):
    row = {
        "prompt": "hi", "chosen": [], "rejected": [], "sample0_text": "a", "sample1_text": "b",
        "sample_rewards": [0.5, 1], "sample_original_rewards": [1, 1],
    }  # fmt: skip
    path = tmp_path / "study.json"
    path.write_text(json.dumps([row]))
    assert read_study(path) == [References("hi", ("a", "b"), (1.0, 1.0))]
    assert read_study(path, penalised=True)[0].rewards == (0.5, 1.0)
    path.write_text(json.dumps([{**row, "sample_original_rewards": [1, 1, 1]}]))
    with pytest.raises(ValueError, match="expected 3 sampled texts in row 0, got 2"):
        read_study(path)
    path.write_text(json.dumps([{"prompt": "hi"}]))
    with pytest.raises(ValueError, match="expected 'sample_original_rewards' in row 0"):
        read_study(path)


def test_columns_of_a_data_set():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"prompt": ["b", "a"]})
    rows = [
        References("a", ("x",), (1.0,), (310,)),
        References("b", ("y", "z"), (2.0, 3.0), (1, 2)),
    ]
    found = add_columns(data, rows, length_penalty=(300, 0.1))
    assert found["ref_rewards"][:] == [[2.0, 3.0], [0.0]]
    assert found["ref_completions"][:] == [["y", "z"], ["x"]]
    with pytest.raises(ValueError, match="expected some of the prompt of row 0, got none"):
        add_columns(data, rows[:1])
