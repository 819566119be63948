"""Trainings with other gradients of the head: the gradients, what is shared, figures, the page."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import training_curves
import training_run
from training_run import EXACT, MAKERS, Run, by_loss, by_rule

from gemma_ext.bench.filtering import everything, large_blocks

V, T, STEPS = 600, 16, 6
NOTHING = by_rule(large_blocks(math.inf))


def build(seed: int):
    config = transformers.Gemma2Config(
        vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.Gemma2ForCausalLM(config)


@pytest.fixture
def task() -> training_run.Task:
    ids = torch.arange(40 * T + 1) * 7 % 200  # repeats, so that it is learnt
    windows = ids.unfold(0, T + 1, T)
    rare = training_run.rarest(ids, V)
    return training_run.Task("tiny", build, windows[:32], windows[32:], rare, rate=1e-2, batch=4)


@pytest.mark.parametrize("make", [EXACT, by_rule(everything)], ids=["loss", "formula"])
def test_a_step_is_that_of_the_model(task, make):
    """Losses of two steps: the second is after an update by the gradients."""
    run = training_run.train(task, make, 2, seed=3)
    model, losses = build(3).train(), []
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for step, windows in enumerate(training_run.batches(task, 2, 3)):
        hidden, labels = training_run.hidden_and_labels(model, windows)
        logits = 30 * torch.tanh(model.lm_head(hidden) / 30)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * training_run.rate(step, 2)
        optimizer.step()
        optimizer.zero_grad()
    assert run.losses == pytest.approx(losses, rel=1e-5)
    assert run.heldout == pytest.approx(training_run.heldout_loss(model, task), rel=1e-4)


def test_a_run_learns_and_repeats_by_its_seed(task):
    first, again, other = (training_run.train(task, EXACT, 30, seed) for seed in (0, 0, 1))
    assert first.losses == again.losses
    assert first.losses[0] != other.losses[0]
    assert first.losses[-1] < first.losses[0] - 0.5
    assert first.heldout < first.losses[0] - 0.5
    assert first.rare_norm == first.rare_along == [pytest.approx(1.0)] * 2


def test_every_epoch_has_every_window_once(task):
    steps = list(training_run.batches(task, 16, seed=0))
    assert [len(step) for step in steps] == [4] * 16
    for epoch in (steps[:8], steps[8:]):
        found = sorted(map(tuple, torch.cat(epoch).tolist()))
        assert found == sorted(map(tuple, task.train.tolist()))
    assert not torch.equal(torch.cat(steps[:8]), torch.cat(steps[8:]))


def test_all_makers_train(task):
    exact = training_run.train(task, EXACT, STEPS, 0)
    for name, make in MAKERS.items():
        run = training_run.train(task, make, STEPS, 0)
        assert run.losses[0] == pytest.approx(exact.losses[0], rel=1e-3), name
        assert len(run.losses) == len(run.kept) == STEPS
        assert all(0 < kept <= 1 for kept in run.kept), name


def test_a_rule_that_drops_all_learns_nothing_and_shows(task):
    run = training_run.train(task, NOTHING, STEPS, 0)
    assert run.kept == [0.0] * STEPS
    assert run.rare_norm == run.rare_along == [0.0, 0.0]
    assert run.heldout == pytest.approx(training_run.heldout_loss(build(0), task))


def test_rare_rows_are_compared_by_norm_and_by_direction():
    run, exact = Run(), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    training_run.compare_rare(run, 0.5 * exact, exact)
    training_run.compare_rare(run, exact.roll(1, 1), exact)
    assert run.rare_norm == pytest.approx([0.5, 1.0])
    assert run.rare_along == pytest.approx([0.5, 0.0])


def test_the_rarest_are_at_most_as_frequent_as_a_quarter_of_the_ids():
    ids = torch.tensor([0] * 9 + [1] * 4 + [2] * 4 + [3, 5, 5, 5, 6, 6, 6, 7, 7])
    assert training_run.rarest(ids, 8).tolist() == [3, 4]
    assert training_run.rarest(ids, 12).tolist() == [4, 8, 9, 10, 11]


def made(heldout: float, level: float) -> Run:
    losses = [level + 3.0] * 50 + [level + 2.0] * 50 + [level + 1.0] * 50
    return Run(losses, [0.5] * 149 + [0.25], heldout, [1.0, 0.5], [1.0, 0.25])


def test_figures_of_a_row():
    exact = [made(1.0, 0.0), made(1.2, 0.1), made(1.4, 0.2)]
    near = [made(1.01, 0.0), made(1.19, 0.1), made(1.42, 0.2)]
    row = training_curves.row_of("sampled", near, exact)
    assert row["off_marks"]["heldout"] == pytest.approx([0.01, -0.01, 0.02])
    assert row["off"] == pytest.approx(0.02 / 3)
    assert row["error"] == pytest.approx(0.0152753 / 3**0.5, rel=1e-4)
    assert row["spread"] == pytest.approx(0.20551, rel=1e-3)
    assert [row["third"], row["two_thirds"], row["end"]] == pytest.approx([3.1, 2.1, 1.1])
    assert row["kept"] == "0.500 to 0.250"
    assert row["rare_along"] == "1.000 to 0.250"
    assert len(row["curves"][0]) == 15
    assert "MISS" not in row["bars"]
    far = training_curves.row_of("cut-ce", [made(r.heldout + 0.5, 0.3) for r in exact], exact)
    assert far["bars"].count("MISS") == 8
    assert training_curves.row_of("exact", exact, exact)["bars"] == ""
    alone = training_curves.row_of("sampled", near[:1], exact[:1])
    assert alone["error"] is None
    assert alone["bars"] == ""


def test_runs_of_a_seed_are_paired_and_a_page_is_saved(task, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(MAKERS, "sampled", by_loss(impl="exact"))
    monkeypatch.setitem(MAKERS, "cut-ce", NOTHING)
    rows = list(training_curves.all_rows(task, ["sampled", "cut-ce"], STEPS, seeds=2))
    assert [row["name"] for row in rows] == ["exact", "sampled", "cut-ce"]
    assert rows[1]["off_marks"]["heldout"] == [0.0, 0.0]  # the same batches from the same start
    assert rows[2]["off"] > 0
    assert capsys.readouterr().out.count("seed 1") == 3
    rows = [row | {"setting": "short"} for row in rows]
    facts = {"device": "somewhere", "commit": "abc", "date": "today", "load": "0"}
    training_curves.save(tmp_path, rows, facts, "tiny")
    page = (tmp_path / "training.md").read_text()
    assert "## tiny, short" in page
    assert "- cut-ce: running loss at 1/3" in page
    assert (tmp_path / "training_tiny.png").stat().st_size > 1000
