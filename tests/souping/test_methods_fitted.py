"""Fisher merging, RegMean and RegMean++."""

from __future__ import annotations

import copy

import pytest
import torch
from merge_oracle import assert_near, family, run
from tiny_lm import batch, gemma2, tuned
from torch import nn

from gemma_ext.souping.methods import METHODS
from gemma_ext.souping.methods.regmean import regmean
from gemma_ext.souping.methods.regmean_plus_plus import decoder_layers, regmean_plus_plus
from gemma_ext.souping.statistics import collect_grams

Fisher, RegMean = METHODS["fisher"], METHODS["regmean"]
WEIGHTS = [0.5, 1.0, 0.2]


def random(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(11)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("floor_first", [False, True])
def test_fisher(generator, normalize, floor_first):
    tunes, base = family(3)
    fishers = [{n: random(generator, *t.shape).square().float() * 10.0**-k for n, t in base.items()}
               for k in range(3)]  # fmt: skip
    fishers[1]["model.layers.0.norm.weight"].zero_()
    got = run(Fisher(fishers), tunes, weight=WEIGHTS, normalize=normalize, floor=1e-2,
              floor_first=floor_first)  # fmt: skip
    scale = [
        w / (sum(float(f.double().square().sum()) for f in own.values()) ** 0.5 if normalize else 1)
        for w, own in zip(WEIGHTS, fishers, strict=True)
    ]
    true = {}
    for n in base:
        f = torch.stack([own[n].double() for own in fishers])
        f = torch.cat([f[:1].clamp(min=1e-2), f[1:] if floor_first else f[1:].clamp(min=1e-2)])
        f = f * torch.tensor(scale, dtype=torch.float64).view(-1, *[1] * (f.dim() - 1))
        x = torch.stack([t[n].double() for t in tunes])
        true[n] = (f * x).sum(0) / f.sum(0)
    assert_near(got, true)


def test_equal_fishers_give_the_linear_soup():
    tunes, base = family(3)
    fishers = [{n: torch.full_like(t, 0.3) for n, t in base.items()}] * 3
    got = run(Fisher(fishers), tunes, weight=WEIGHTS)
    assert_near(got, run(METHODS["linear"], tunes, weight=WEIGHTS), 3e-7)


def test_without_a_fisher_it_is_the_linear_soup():
    tunes, base = family(2)
    name = "model.embed_tokens.weight"
    fishers = [{n: torch.rand_like(t) for n, t in base.items() if n != name} for _ in tunes]
    got = run(Fisher(fishers), tunes, base, weight=[0.2, 0.6])
    assert_near(
        {name: got[name]}, {name: run(METHODS["linear"], tunes, weight=[0.2, 0.6])[name]}, 0
    )


def test_where_nobody_knows_the_base_stays():
    tunes, base = family(2)
    fishers = [{n: torch.zeros_like(t) for n, t in base.items()}] * 2
    assert_near(run(Fisher(fishers), tunes, base, floor=0.0, normalize=False), base, 0)


def problem(generator, models=3, rows=200, inputs=7, outputs=5):
    weights = [random(generator, outputs, inputs) for _ in range(models)]
    grams = []
    for _ in range(models):
        x = random(generator, rows, inputs) @ random(generator, inputs, inputs)
        grams.append(x.T @ x / rows)
    return weights, grams


@pytest.mark.parametrize("reduction", [0.0, 0.5, 1.0])
def test_regmean_solves_its_normal_equations(generator, reduction):
    weights, grams = problem(generator)
    merged = regmean(weights, grams, WEIGHTS, reduction=reduction, ridge=0.0)
    left, right = torch.zeros(7, 7, dtype=torch.float64), torch.zeros(7, 5, dtype=torch.float64)
    for c, g, w in zip(WEIGHTS, grams, weights, strict=True):
        g = reduction * g + (1 - reduction) * torch.diag(torch.diag(g))
        left += c * g
        right += c * g @ w.T
    assert float((left @ merged.T - right).abs().max() / right.abs().max()) < 1e-10


def test_regmean_minimises_the_distance_of_outputs(generator):
    weights, grams = problem(generator)
    merged = regmean(weights, grams, reduction=1.0)

    def loss(w):
        return sum(
            float(((w - own) @ g @ (w - own).T).trace())
            for own, g in zip(weights, grams, strict=True)
        )

    best = loss(merged)
    for _ in range(20):
        assert loss(merged + 1e-3 * random(generator, 5, 7)) > best


def test_regmean_of_identity_grams_is_the_mean(generator):
    weights, _ = problem(generator)
    eye = [torch.eye(7, dtype=torch.float64)] * 3
    assert torch.allclose(regmean(weights, eye), torch.stack(weights).mean(0), rtol=0, atol=1e-14)


def test_regmean_of_one_model_is_the_model(generator):
    weights, grams = problem(generator, models=1)
    assert torch.allclose(regmean(weights, grams, ridge=0.0), weights[0], rtol=0, atol=1e-11)
    # a Gram matrix of fewer rows than columns: the ridge pulls towards the model itself
    x = random(generator, 3, 7)
    assert torch.allclose(regmean(weights, [x.T @ x]), weights[0], rtol=0, atol=1e-4)


def test_regmean_of_negative_weights_is_refused(generator):
    weights, grams = problem(generator)
    with pytest.raises(
        ValueError, match=r"expected weights >= 0 with regmean, got \[1.0, -0.5, 1.0"
    ):
        regmean(weights, grams, [1.0, -0.5, 1.0])


def test_regmean_without_inputs_is_the_mean(generator):
    weights, _ = problem(generator)
    zero = [torch.zeros(7, 7, dtype=torch.float64)] * 3
    assert torch.allclose(regmean(weights, zero), torch.stack(weights).mean(0), rtol=0, atol=1e-14)


def test_regmean_recovers_a_planted_layer(generator):
    """Noise that each model's own inputs never see costs nothing."""
    planted = random(generator, 5, 8)
    weights, grams = [], []
    for half in (slice(0, 4), slice(4, 8)):
        basis = torch.zeros(4, 8, dtype=torch.float64)
        basis[:, half] = torch.eye(4, dtype=torch.float64)
        x = random(generator, 50, 4) @ basis
        noise = random(generator, 5, 8)
        noise[:, half] = 0
        weights.append(planted + noise)
        grams.append(x.T @ x / 50)
    assert torch.allclose(regmean(weights, grams, reduction=1.0), planted, rtol=0, atol=1e-8)


def test_regmean_follows_a_permutation_of_its_inputs(generator):
    weights, grams = problem(generator)
    order = torch.randperm(7, generator=generator)
    merged = regmean(weights, grams)
    turned = regmean([w[:, order] for w in weights], [g[order][:, order] for g in grams])
    assert torch.allclose(turned, merged[:, order], rtol=0, atol=1e-11)


def test_regmean_as_a_method(generator):
    tunes, base = family(3)
    name = "model.layers.0.mlp.up_proj.weight"
    grams = [{name: (x := random(generator, 30, 8)).T @ x} for _ in tunes]
    got = run(RegMean(grams), tunes, base, weight=WEIGHTS, reduction=0.3)
    true = regmean([t[name] for t in tunes], [g[name] for g in grams], WEIGHTS, reduction=0.3)
    assert_near({name: got[name]}, {name: true})
    soup = run(METHODS["linear"], tunes, weight=WEIGHTS)
    assert_near({n: t for n, t in got.items() if n != name},
                {n: t for n, t in soup.items() if n != name}, 0)  # fmt: skip


@pytest.fixture
def experts():
    base = gemma2()
    return [tuned(base, seed, size=0.1) for seed in (1, 2)], [[batch(10), batch(11)], [batch(12)]]


def mean_of(models):
    merged = copy.deepcopy(models[0])
    with torch.no_grad():
        for parameter, *others in zip(*(m.parameters() for m in (merged, *models)), strict=True):
            parameter.copy_(torch.stack([o.double() for o in others]).mean(0))
    return merged


def test_regmean_plus_plus_layer_by_layer(experts):
    """Each layer against RegMean of Gram matrices that are taken here, in a loop of its own."""
    models, batches = experts
    merged = mean_of(models)
    regmean_plus_plus(merged, models, batches, reduction=0.4)
    slow = mean_of(models)
    for index in range(3):
        grams = []
        for model, own in zip(models, batches, strict=True):
            # the merged model with this model's layer in the place of its own
            hybrid = copy.deepcopy(slow)
            hybrid.model.layers[index] = copy.deepcopy(model.model.layers[index])
            grams.append(collect_grams(hybrid, own))
        for name, module in slow.model.layers[index].named_modules():
            if isinstance(module, nn.Linear):
                key = f"model.layers.{index}.{name}.weight"
                found = regmean([m.get_parameter(key) for m in models], [g[key] for g in grams],
                                reduction=0.4)  # fmt: skip
                module.weight.data.copy_(found)
    for (name, ours), theirs in zip(merged.named_parameters(), slow.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-4), name
    moved = mean_of(models).get_parameter("model.layers.2.mlp.up_proj.weight")
    assert not torch.allclose(merged.model.layers[2].mlp.up_proj.weight, moved, atol=1e-3)


def test_regmean_plus_plus_of_one_model_is_the_model(experts):
    models, batches = experts
    merged = mean_of(models[:1])
    regmean_plus_plus(merged, models[:1], batches[:1])
    for ours, theirs in zip(merged.parameters(), models[0].parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)


def test_regmean_plus_plus_arguments(experts):
    models, batches = experts
    with pytest.raises(ValueError, match="expected batches of 2 models, got 1"):
        regmean_plus_plus(mean_of(models), models, batches[:1])
    with pytest.raises(ValueError, match="expected at least one batch for every model, got none"):
        regmean_plus_plus(mean_of(models), models, [batches[0], []])


def test_models_without_layers_are_named():
    class Bare(nn.Module):
        def get_decoder(self):
            return self

    with pytest.raises(ValueError, match="expected decoder layers in Bare, got none"):
        decoder_layers(Bare())
