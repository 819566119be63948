"""Coefficients that learn, and masks that are trained."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_lm import batch, gemma2, tuned

from gemma_ext.souping.adaptive import Coefficients, adamerging, minimise
from gemma_ext.souping.live import parameters_of
from gemma_ext.souping.localize import largest, localize


@pytest.fixture(scope="module")
def models():
    base = gemma2()
    return base, [tuned(base, seed, size=0.1) for seed in (1, 2)]


@pytest.mark.parametrize(("per", "groups"), [("model", 1), ("layer", 4), ("tensor", 35)])
def test_merge_and_its_gradient(models, per, groups):
    """d f / d lambda_gm = sum of <d f / d theta, delta_m> over the group's tensors."""
    base, experts = models
    coefficients = Coefficients(base, experts, per=per, start=0.4)
    assert coefficients.values.shape == (groups, 2)
    merged = coefficients.tensors()
    generator = torch.Generator().manual_seed(1)
    along = {n: torch.randn(t.shape, generator=generator) for n, t in merged.items()}
    sum((along[n] * t).sum() for n, t in merged.items()).backward()
    true = torch.zeros(groups, 2, dtype=torch.float64)
    deltas = [
        {n: p.double() - parameters_of(base)[n].double() for n, p in parameters_of(e).items()}
        for e in experts
    ]
    for row, name in zip(coefficients.rows.tolist(), merged, strict=True):
        for m in range(2):
            true[row, m] += (along[name].double() * deltas[m][name]).sum()
        expected = parameters_of(base)[name].double() + 0.4 * sum(d[name] for d in deltas)
        assert torch.allclose(merged[name].double(), expected, rtol=0, atol=1e-6)
    assert torch.allclose(coefficients.values.grad.double(), true, rtol=1e-4, atol=1e-5)


def test_groups_are_the_layers(models):
    base, experts = models
    groups = Coefficients(base, experts).groups
    assert sorted(groups) == ["layer 0", "layer 1", "layer 2", "outside"]
    assert Coefficients(base, experts, per="model").groups == ["model"]


def test_call_runs_the_merge_and_changes_nothing(models):
    base, experts = models
    coefficients = Coefficients(base, experts, start=0.0)
    with torch.no_grad():
        coefficients.values[:, 0] = 1.0
    tokens, before = batch(), {n: p.clone() for n, p in parameters_of(base).items()}
    logits = coefficients.call(base, **tokens).logits
    assert torch.allclose(logits, experts[0](**tokens).logits, atol=1e-4)
    for name, parameter in parameters_of(base).items():
        assert torch.equal(parameter, before[name])
    written = copy.deepcopy(base)
    coefficients.write_(written)
    assert torch.allclose(written(**tokens).logits, experts[0](**tokens).logits, atol=1e-4)


def test_minimise_finds_a_planted_mixture(models):
    base, experts = models
    coefficients = Coefficients(base, experts, per="model", start=0.3)
    deltas = [
        {n: p.double() - parameters_of(base)[n].double() for n, p in parameters_of(e).items()}
        for e in experts
    ]
    goal = {
        n: parameters_of(base)[n].double() + 0.8 * deltas[0][n] + 0.1 * deltas[1][n]
        for n in deltas[0]
    }

    def loss(step):
        return sum((t.double() - goal[n]).square().sum() for n, t in coefficients.tensors().items())

    history = minimise(coefficients, loss, steps=150, lr=0.05)
    assert history[-1] < 1e-3 * history[0]
    assert torch.allclose(coefficients.values.detach(), torch.tensor([[0.8, 0.1]]), atol=0.02)


def test_bounds_hold(models):
    base, experts = models
    coefficients = Coefficients(base, experts, per="model", start=0.3)
    minimise(
        coefficients, lambda step: -coefficients.values.sum(), steps=5, lr=1.0, bounds=(0.0, 0.5)
    )
    assert torch.equal(coefficients.values.detach(), torch.full((1, 2), 0.5))
    minimise(coefficients, lambda step: -coefficients.values.sum(), steps=2, lr=1.0, bounds=None)
    assert float(coefficients.values.detach().min()) > 2


def test_adamerging_lowers_the_entropy(models):
    base, experts = models
    coefficients = Coefficients(base, experts)
    texts = [batch(1), batch(2)]
    history = adamerging(base, coefficients, texts, steps=20, lr=0.05)
    full = coefficients.call(base, **texts[0]).logits[:, :-1].float().log_softmax(-1)
    entropy = -(full.exp() * full).sum(-1)
    mask = texts[0]["attention_mask"][:, 1:].bool()
    assert history[-2] < history[0]
    again = adamerging(base, coefficients, texts[:1], steps=1)
    assert again[0] == pytest.approx(float(entropy[mask].mean().detach()), rel=1e-4)
    assert float(coefficients.values.detach().min()) >= 0


def test_coefficients_arguments(models):
    base, experts = models
    with pytest.raises(
        ValueError, match="expected per to be one of model, layer, tensor, got 'row'"
    ):
        Coefficients(base, experts, per="row")
    with pytest.raises(ValueError, match="expected at least one expert, got none"):
        Coefficients(base, [])
    with pytest.raises(ValueError, match="expected at least one batch, got none"):
        adamerging(base, Coefficients(base, experts), [])


def test_largest_counts_over_the_model(models):
    base, experts = models
    b, x = parameters_of(base), parameters_of(experts[0])
    masks = largest(b, x, 0.2)
    total = sum(t.numel() for t in b.values())
    assert sum(int(m.sum()) for m in masks.values()) == int(0.2 * total)
    least = min(float((x[n] - b[n]).abs()[m].min()) for n, m in masks.items() if m.any())
    most = max(float((x[n] - b[n]).abs()[~m].max()) for n, m in masks.items() if not m.all())
    assert least >= most
    assert not any(m.any() for m in largest(b, x, 0.0).values())


def test_without_steps_the_masks_are_the_dataless_ones(models):
    base, experts = models
    masks = localize(base, experts[0], [batch()], density=0.15, epochs=0)
    start = largest(parameters_of(base), parameters_of(experts[0]), 0.15)
    for name, mask in masks.items():
        assert torch.equal(mask.bool(), start[name])


def test_one_step_is_the_gradient_of_the_gates(models):
    """Signs of the gates after a step, with the gradient from autograd through the gates."""
    base, experts = models
    tokens, lr, l1 = batch(), 2e4, 0.3
    masks = localize(base, experts[0], [tokens], density=0.3, bias=2.0, lr=lr, l1=l1)
    b, x = parameters_of(base), parameters_of(experts[0])
    start = largest(b, x, 0.3)
    gates = {n: torch.where(m, 2.0, -2.0).requires_grad_() for n, m in start.items()}
    merged = {n: b[n] + gates[n].sigmoid() * (x[n] - b[n]) for n in b}
    logits = torch.func.functional_call(base, merged, (), tokens).logits.float()
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    count = sum(g.numel() for g in gates.values())
    penalty = l1 * sum(g.sigmoid().sum() for g in gates.values()) / count
    slopes = torch.autograd.grad(loss + penalty, list(gates.values()))
    wrong = total = moved = 0
    for (name, gate), slope in zip(gates.items(), slopes, strict=True):
        after = gate.detach() - lr * slope
        sure = after.abs() > 0.05
        wrong += int(((after > 0) != masks[name].bool())[sure].sum())
        moved += int((masks[name].bool() != start[name]).sum())
        total += gate.numel()
    assert wrong == 0
    assert 0.01 * total < moved


def test_masks_of_untrained_parameters_are_left_out(models):
    base, experts = models
    masks = localize(base, experts[0], [batch()], epochs=1, trained=lambda n: "embed" not in n)
    assert "model.embed_tokens.weight" not in masks
    assert "model.norm.weight" in masks
    with pytest.raises(ValueError, match="expected at least one batch, got none"):
        localize(base, experts[0], [])


def test_penalty_closes_gates(models):
    base, experts = models
    open_ = [
        sum(
            float(m.sum())
            for m in localize(base, experts[0], [batch()], density=0.3, lr=1e5, l1=l1).values()
        )
        for l1 in (0.0, 10.0)
    ]
    assert open_[1] < open_[0]


def test_labels_say_what_counts(models):
    base, experts = models
    tokens = batch()
    silent = {**tokens, "labels": torch.full_like(tokens["input_ids"], -100)}
    masks = localize(base, experts[0], [silent], density=0.2)
    start = largest(parameters_of(base), parameters_of(experts[0]), 0.2)
    assert all(torch.equal(m.bool(), start[n]) for n, m in masks.items())
