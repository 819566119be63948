"""The filter's formulas against autograd and their definitions; errors of a whole model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from gemma_ext.bench import data, filtering

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import filter_table

N, D, V = 150, 64, 1100  # a second panel of rows, a ragged strip


@pytest.fixture(scope="module")
def head() -> data.HeadData:
    return data.head_data("plaw-2.5", N, D, V)


def by_rule(head: data.HeadData, *rule: filtering.Rule, softcap=30.0) -> filtering.Gradients:
    return filtering.gradients(head.e, head.c, head.targets, softcap, *rule)


@pytest.mark.parametrize("softcap", [30.0, None])
def test_without_a_rule_they_are_exact(head, softcap):
    e, c = (x.double().requires_grad_() for x in (head.e, head.c))
    logits = e @ c.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    F.cross_entropy(logits, head.targets).backward()
    found = by_rule(head, softcap=softcap)
    assert found.kept == 1.0
    assert (found.de - e.grad).norm() < 1e-4 * e.grad.norm()
    assert (found.dc - c.grad).norm() < 1e-4 * c.grad.norm()


def test_blocks_follow_the_predicate():
    g = torch.zeros(128, 300)
    g[5, 130], g[7, 290] = -2.0, 0.5
    kept = filtering.large_blocks(1.0)(g, torch.zeros(128, dtype=torch.int64))
    assert kept == pytest.approx(1 / 3)
    assert g[5, 130] == -2.0
    assert g[7, 290] == 0.0


def test_draws_keep_large_strips_and_are_unbiased():
    tau, labels = 0.1, torch.tensor([700, 3])
    mass = torch.tensor([[0.5, 0.03, 0.001, 0.07, 0.0], [0.02, 0.2, 0.0, 0.03, 0.09]])
    g = torch.repeat_interleave(mass / filtering.STRIP, filtering.STRIP, 1)[:, :1100]
    strips = filtering.tiles(g, filtering.STRIP).sum(2)
    total, shares = torch.zeros_like(strips), []
    for seed in range(2000):
        drawn = g.clone()
        shares.append(filtering.sampled_strips(tau, seed)(drawn, labels))
        found = filtering.tiles(drawn, filtering.STRIP).sum(2)
        for kept in ((0, 0), (0, 2), (1, 1), (1, 0)):  # above tau, or with the label
            assert found[kept] == pytest.approx(strips[kept].item(), rel=1e-5)
        # what a row has is kept up to one tau for the strips that are drawn
        assert (found.sum(1) - strips.sum(1)).abs().max() <= tau + 1e-6
        total += found
    assert torch.allclose(total / 2000, strips, atol=0.005)
    q = (strips / tau).clamp(max=1)
    q[0, 2] = q[1, 0] = 1
    assert sum(shares) / 2000 == pytest.approx(q.mean().item(), abs=0.01)


def test_a_smaller_tau_keeps_more_and_errs_less(head):
    exact = by_rule(head)
    found = [by_rule(head, filtering.sampled_strips(2.0**-k)) for k in (4, 8, 12)]
    assert found[0].kept < found[1].kept < found[2].kept
    errors = [(f.de - exact.de).norm() for f in found]
    assert errors[0] > errors[1] > errors[2]


@pytest.fixture(scope="module")
def trained() -> filter_table.Trained:
    config = transformers.Gemma2Config(
        vocab_size=600, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=32, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config)
    return filter_table.Trained(model, torch.randint(1, 600, (1, 41)))


def test_exact_gradients_are_those_of_the_model(trained):
    model = trained.model
    model.zero_grad(set_to_none=True)
    model(input_ids=trained.ids, labels=trained.ids).loss.backward()
    found = trained.errors(model)
    assert max(found.values()) < 1e-5
    next(model.parameters()).grad.mul_(1.1)  # the embeddings
    found = trained.errors(model)
    assert found["all"] > 0.01
    assert found["backbone"] < 1e-5


def test_an_error_of_the_head_reaches_all_parameters(trained):
    exact = trained.by_rule()
    wrong = filtering.Gradients(1.5 * exact.de, 1.5 * exact.dc, 0.25)
    row = trained.row("wrong", wrong)
    assert row["kept"] == 0.25
    for key in ("de", "all", "backbone"):
        assert row[key] == pytest.approx(0.5, rel=1e-3)


def test_all_rows_are_printed(trained):
    rows = {row["row"]: row for row in filter_table.table_rows(trained, "formula", seed=0)}
    assert rows["ours, exact"]["all"] < 1e-5
    assert rows["sampled by formula, tau 2^-10"]["kept"] <= 1
    assert 1e-4 < rows["whole model in bfloat16, eager"]["all"] < 0.2
    assert set(filter_table.COLUMNS) >= {key for row in rows.values() for key in row}
    assert trained.hidden is None
