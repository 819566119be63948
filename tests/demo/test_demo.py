"""The demo on tiny shapes: real stages, a page that stands alone, and a second run that resumes."""

import json
import re

import pytest
import torch

from gemma_ext.demo import command, head, training
from gemma_ext.demo.stages import stage

HEAD = head.Head(tokens=32, width=96, vocabulary=1200, dtype="fp32", threads=1, rounds=1)


@pytest.fixture
def plan(tiny_size):
    return training.Plan(size=tiny_size, steps=6, batch=4)


@pytest.fixture
def result(plan, tmp_path):
    return command.run(tmp_path / "demo", plan, HEAD, show_progress=False)


def test_both_trainings_agree_and_the_page_stands_alone(result, tmp_path, plan, monkeypatch):
    page = (tmp_path / "demo" / "report.html").read_text()
    assert result["page"] == str(tmp_path / "demo" / "report.html")
    assert len(result["numbers"]) == 5
    for name, value in result["numbers"]:
        assert name in page
        assert value in page
    assert page.count("<svg") == 3
    for tokens in (plan.tokens, HEAD.tokens):
        assert f"{tokens:,} tokens" in page
    assert torch.ops.gemma_ext.cpu_isa() in page
    links = set(re.findall(r'(?:src|href)="([^"#]+)"', page))
    assert not {link for link in links if not link.startswith("data:")}
    kept = {
        loss: json.loads((tmp_path / "demo" / f"training-{loss}.json").read_text())["result"]
        for loss in training.LOSSES
    }
    assert len(kept["ours"]["losses"]) == len(kept["ours"]["seconds"]) == 6
    assert kept["ours"]["losses"] == pytest.approx(kept["eager"]["losses"], rel=1e-4)
    assert kept["ours"]["perplexity"] == pytest.approx(kept["eager"]["perplexity"], rel=1e-3)
    assert not list((tmp_path / "demo").glob("*/"))

    def unexpected(*arguments):
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr(command, "train", unexpected)
    monkeypatch.setattr(command, "measure_apart", unexpected)
    again = command.run(tmp_path / "demo", plan, HEAD, show_progress=False)
    assert again["numbers"] == result["numbers"]


def test_an_interrupted_training_is_taken_up(plan, tmp_path, monkeypatch):
    expected = training.train(plan, "eager", tmp_path / "whole", show_progress=False)
    monkeypatch.setattr(training, "_SAVE_EVERY", 2)
    clock, steps = training._step_clock, []

    def seen(count, note):
        steps.append(count)

    def interrupt(count, note):
        seen(count, note)
        if sum(steps) > 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_step_clock", lambda advance: clock(interrupt))
    with pytest.raises(KeyboardInterrupt):
        training.train(plan, "eager", tmp_path / "parts", show_progress=False)
    torn = tmp_path / "parts" / "checkpoint-6"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"torn")

    steps.clear()
    monkeypatch.setattr(training, "_step_clock", lambda advance: clock(seen))
    got = training.train(plan, "eager", tmp_path / "parts", show_progress=False)
    assert steps == [5, 1]  # the bar begins where the training does
    assert got["losses"] == expected["losses"]
    assert got["perplexity"] == expected["perplexity"]


def test_head_measures_the_same_loss_every_way():
    runs = {loss: head.measure_apart(loss, HEAD) for loss in head.LOSSES}
    for loss in ("exact", "sampled"):
        assert runs[loss]["loss"] == pytest.approx(runs["eager"]["loss"], rel=1e-5)
    assert runs["eager"]["gradients"] == 4 * 96 * (32 + 1200)
    assert runs["eager"]["kept"] == runs["exact"]["kept"] == 1
    assert 0 < runs["sampled"]["kept"] < 1
    assert {run["isa"] for run in runs.values()} == {torch.ops.gemma_ext.cpu_isa()}
    for run in runs.values():
        assert run["seconds"] >= run["forward"] > 0


def test_head_passes_on_what_the_process_said(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho out of memory >&2\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setattr(head.sys, "executable", str(program))
    with pytest.raises(RuntimeError, match="head, sampled: exit status 9: out of memory"):
        head.measure_apart("sampled", HEAD)


def test_stage_runs_again_only_for_another_key(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"n": len(made)}

    path = tmp_path / "stage.json"
    assert stage(path, {"a": 1}, make) == stage(path, {"a": 1}, make) == {"n": 1}
    assert stage(path, {"a": 2}, make) == {"n": 2}
    assert stage(path, {"a": 2}, make) == {"n": 2}
