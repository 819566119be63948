"""Held-out losses, the linear mode, the collapse detector, the choice of alpha."""

from __future__ import annotations

import math

import pytest
import torch
from salsa_toy import VOCAB, heads_only, model, near, responses

from gemma_ext.papers import salsa
from gemma_ext.papers.salsa import LinearMode
from gemma_ext.papers.salsa.choice import GRID
from gemma_ext.souping import greedy_soup


def text(seed, rows=4, length=12):
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def loss64(of, ids, labels, mask=None):
    z = of(input_ids=ids, attention_mask=mask).logits[:, :-1].double().log_softmax(-1)
    took = labels[:, 1:] != -100
    return float(-z[took].gather(1, labels[:, 1:][took].unsqueeze(1)).mean())


def test_the_held_out_loss_is_the_mean_over_labels():
    one, first, second = model(0), text(1), text(2, rows=2, length=7)
    one.train()
    total = loss64(one, first, first) * 44 + loss64(one, second, second) * 12
    assert salsa.held_out_loss(one, [first, second]) == pytest.approx(total / 56, rel=1e-5)
    assert one.training


def test_prompts_and_padding_take_no_part():
    one, ids = model(0), text(1)
    labels = ids.clone()
    labels[:, :5] = -100
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    known = loss64(one, ids, labels.masked_fill(mask == 0, -100), mask)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert salsa.held_out_loss(one, [batch]) == pytest.approx(known, rel=1e-5)
    batch["labels"] = torch.full_like(ids, -100)
    with pytest.raises(ValueError, match="expected labels in the held-out batches"):
        salsa.held_out_loss(one, [batch])


def test_the_linear_mode_is_judged_against_the_worst_parent():
    one = model(0)
    two = near(one, 1, by=0.01)
    batches = [text(1)]
    kept = salsa.linear_mode([one, two], salsa.soup([one, two]), batches, tolerance=0.5)
    assert kept.parents == tuple(salsa.held_out_loss(m, batches) for m in (one, two))
    assert kept.holds
    assert kept.require() is kept
    assert kept.barrier == pytest.approx(kept.soup - max(kept.parents))
    with pytest.raises(ValueError, match=r"at most 3\.0000, the worst of its parents \(2\.5000, 3"):
        LinearMode((2.5, 3.0), 3.1).require()
    LinearMode((2.5, 3.0), 3.0).require()
    LinearMode((2.5, 3.0), 3.1, tolerance=0.2).require()
    with pytest.raises(ValueError, match="got nan"):
        LinearMode((2.5, 3.0), math.nan).require()


def test_collapse_is_seen_after_its_patience():
    watch = salsa.Collapse([10, 20, 30], patience=2)
    assert watch.least == 6.0
    assert not watch.update([3, 6, 9], [True] * 3)
    assert not watch.update(torch.tensor([1, 2, 9]), torch.tensor([True, True, False]))
    assert watch.seen["collapse/median_length"] == 2.0
    assert watch.seen["collapse/eos_rate"] == pytest.approx(2 / 3)
    assert not watch.update([8, 8, 8], [True] * 3)
    assert not watch.update([1, 1, 1], [True] * 3)
    other = salsa.Collapse([10, 20, 30], patience=2)
    other.load_state_dict(watch.state_dict())
    for one in (watch, other):
        assert one.update([1, 1, 1], [True] * 3)
        assert one.collapsed
        assert "median response has 1 tokens, below 6 for 2 updates, and 100% end" in one.sentence()
    assert watch.update([], [])
    with pytest.raises(ValueError, match="expected lengths"):
        salsa.Collapse([])
    with pytest.raises(ValueError, match=r"share in \(0, 1\)"):
        salsa.Collapse([1], share=1.0)


def test_step_zero_counts_lengths_and_ends():
    one, sequences = model(0), responses(rows=4)
    found = salsa.step_zero(one, {}, sequences, [True, False, False, False])
    lengths = sequences.lengths.tolist()
    assert found["length_mean"] == sum(lengths) / 4
    assert found["length_median"] == sorted(lengths)[1] / 2 + sorted(lengths)[2] / 2
    assert found["eos_rate"] == 0.25


def test_a_sweep_gives_the_losses_of_the_soups():
    one, two = heads_only(2)
    batches = [text(1), text(2)]
    found = salsa.alpha_sweep([one, two], batches)
    assert found.alphas == GRID
    for alpha, loss in zip(found.alphas, found.losses, strict=True):
        soup = salsa.soup([one, two], [alpha, 1 - alpha])
        assert loss == pytest.approx(salsa.held_out_loss(soup, batches), abs=1e-6)
    assert found.losses[found.alphas.index(found.best)] == min(found.losses)


def written():
    """A model, a text [64, 12] of its own, and a stream of random numbers."""
    truth = heads_only(1)[0]
    truth.lm_head.weight.data.mul_(3)
    ids = torch.tensor([[5]] * 64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(11):
            p = truth(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    return truth, ids, generator


def test_the_best_alpha_is_found_between_points_of_the_grid():
    """Parents on both sides of the model that wrote the text: the loss is convex in alpha."""
    truth, ids, generator = written()
    step = torch.randn(truth.lm_head.weight.shape, generator=generator)
    one, two = near(truth, 0, by=0.0), near(truth, 0, by=0.0)
    one.lm_head.weight.data.add_(step * 0.35)
    two.lm_head.weight.data.sub_(step * 0.65)
    coarse = salsa.alpha_sweep([one, two], [ids], grid=[0.0, 0.5, 1.0])
    fine = salsa.alpha_sweep([one, two], [ids], grid=[0.0, 0.5, 1.0], refine=6)
    assert len(fine.alphas) == 9
    assert min(fine.losses) <= min(coarse.losses)
    assert fine.best == pytest.approx(0.65, abs=0.08)


def test_a_greedy_soup_of_seeds_leaves_the_bad_one_out():
    """Parents on both sides of the truth, and one far away."""
    truth, ids, generator = written()
    shape = truth.lm_head.weight.shape
    step, away = (torch.randn(shape, generator=generator) for _ in range(2))
    parents = [near(truth, 0, by=0.0) for _ in range(3)]
    for parent, moved in zip(parents, (0.4 * step, 2 * away, -0.5 * step), strict=True):
        parent.lm_head.weight.data.add_(moved)
    weights = greedy_soup(lambda w: -salsa.held_out_loss(salsa.soup(parents, w), [ids]), 3)
    assert weights == [0.5, 0.0, 0.5]
    greedy = salsa.SoupReference(parents, weights).model
    losses = [salsa.held_out_loss(m, [ids]) for m in (greedy, salsa.soup(parents), *parents)]
    assert losses[0] < min(losses[1:])


@pytest.mark.timeout(60)
def test_a_sweep_of_one_point_has_nothing_to_refine():
    one, two = heads_only(2)
    assert salsa.alpha_sweep([one, two], [text(1)], grid=[0.5], refine=3).alphas == (0.5,)


def test_of_equal_alphas_the_middle_is_taken():
    assert salsa.Alphas((0.0, 0.5, 1.0), (2.0, 2.0, 2.0)).best == 0.5


def test_sweeps_refuse_what_they_cannot_do():
    one, two = heads_only(2)
    with pytest.raises(ValueError, match="expected two parents, got 3"):
        salsa.alpha_sweep([one, two, two], [text(1)])
    with pytest.raises(ValueError, match="ascending order"):
        salsa.alpha_sweep([one, two], [text(1)], grid=[1.0, 0.0])
    with pytest.raises(ValueError, match="expected two parents, got 1"):
        salsa.layer_alphas([one], [text(1)])
    with pytest.raises(ValueError, match="at least one batch"):
        salsa.layer_alphas([one, two], [])


def test_layer_alphas_find_the_good_half_of_each_parent():
    """Each parent is the text's author in one layer and spoiled in the other."""
    author = model(0)
    author.model.embed_tokens.weight.data.mul_(0.6)
    ids = torch.arange(4, 67).repeat(2)[:, None]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(11):
            p = author(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    one, two = near(author, 0, by=0.0), near(author, 0, by=0.0)
    for spoiled, layer in ((one, 1), (two, 0)):
        for parameter in spoiled.model.layers[layer].parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    weights = salsa.layer_alphas([one, two], [ids], steps=40, lr=0.05)
    assert set(weights) == {"layer 0", "layer 1", "outside"}
    assert weights["layer 0"][0] > 0.8
    assert weights["layer 1"][0] < 0.2
    even = salsa.held_out_loss(salsa.soup([one, two]), [ids])
    assert salsa.held_out_loss(salsa.soup([one, two], weights), [ids]) < even
