"""LoRA parents, WARP's merge, rewarded soups: against float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from salsa_toy import model, near

from gemma_ext.papers import salsa
from gemma_ext.souping.lora import Adapter, Factors, load_adapter, save_adapter


def named(of):
    return dict(of.named_parameters())


def tuned(base, folder, seed, rank=3, targets=("q_proj", "down_proj")):
    """A LoRA run of a base, as peft saves it, and the merged model it stands for."""
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=rank, lora_alpha=5, target_modules=list(targets))
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    made.save_pretrained(folder)
    return load_adapter(folder), made.merge_and_unload().eval()


def test_lora_parents_are_averaged_by_their_updates(tmp_path):
    base = model(0)
    (one, first), (two, second) = (
        tuned(base, tmp_path / "1", 1),
        tuned(base, tmp_path / "2", 2, rank=5),
    )
    made = named(salsa.lora_soup(base, [one, two], [0.3, 0.7]))
    expected = named(salsa.soup([first, second], [0.3, 0.7]))
    for name in expected:
        torch.testing.assert_close(made[name], expected[name], rtol=1e-5, atol=1e-6)
    # the average of the factors is another model
    name = "model.layers.0.mlp.down_proj"
    factors = [adapter.factors[name] for adapter in (one, tuned(base, tmp_path / "3", 3)[0])]
    b = sum(f.b for f in factors) / 2
    a = sum(f.a for f in factors) / 2
    mean = sum(f.dense() for f in factors) / 2
    assert (factors[0].scaling * b @ a - mean).abs().max() > 0.05 * mean.abs().max()


def test_the_average_is_an_adapter_that_peft_loads(tmp_path):
    from peft import PeftModel

    base = model(0)
    (one, first), (two, second) = (
        tuned(base, tmp_path / "1", 1),
        tuned(base, tmp_path / "2", 2, targets=("q_proj",)),
    )
    average = salsa.lora_average([one, two])
    assert average.factors["model.layers.0.self_attn.q_proj"].rank == 6
    save_adapter(average, tmp_path / "average")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "average")
    loaded = named(loaded.merge_and_unload())
    expected = named(salsa.soup([first, second]))
    soup = named(salsa.lora_soup(base, [one, two]))
    for name in expected:
        torch.testing.assert_close(loaded[name], expected[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(soup[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_lora_soup_of_a_bfloat16_base_is_rounded_once(tmp_path):
    base = model(0, torch.bfloat16)
    adapters = [tuned(model(0), tmp_path / f"{k}", k)[0] for k in (1, 2)]
    made = named(salsa.lora_soup(base, adapters))
    for name, parameter in named(base).items():
        module = name.removesuffix(".weight")
        exact = parameter.double()
        if module in adapters[0].factors:
            exact = exact + sum(a.factors[module].dense(torch.float64) for a in adapters) / 2
        half = exact.abs() * 2**-8 + 1e-6
        assert ((made[name].double() - exact).abs() <= half).all(), name
    for one, two in zip(
        named(base).values(), named(model(0, torch.bfloat16)).values(), strict=True
    ):
        assert torch.equal(one, two)


def test_an_update_of_an_embedding_is_transposed():
    base = model(0, tie_word_embeddings=False)
    factors = Factors(torch.randn(2, 67), torch.randn(32, 2), 0.5)
    adapter = Adapter({"model.embed_tokens": factors}, {}, frozenset({"model.embed_tokens"}))
    made = salsa.lora_soup(base, [adapter]).model.embed_tokens.weight
    torch.testing.assert_close(made, base.model.embed_tokens.weight + factors.dense().T)


def test_adapters_that_do_not_fit_are_refused():
    base = model(0)
    factors = Factors(torch.ones(1, 32), torch.ones(32, 1))
    with pytest.raises(ValueError, match=r"expected a module model\.nowhere in the base"):
        salsa.lora_soup(base, [Adapter({"model.nowhere": factors}, {})])
    with pytest.raises(ValueError, match=r"expected an update of \[32, 48\] for .*got \[32, 32\]"):
        salsa.lora_soup(base, [Adapter({"model.layers.0.mlp.down_proj": factors}, {})])
    with pytest.raises(ValueError, match="to add up to 1, got 2"):
        salsa.lora_average([Adapter({}, {}), Adapter({}, {})], [1.0, 1.0])
    with pytest.raises(ValueError, match="at least one adapter"):
        salsa.lora_average([])


def arc(one, two, t):
    """float64 slerp of two flat vectors, from the formula."""
    angle = torch.acos((one @ two) / (one.norm() * two.norm()))
    if abs(math.cos(angle)) > 0.9995:
        return (1 - t) * one + t * two
    return (((1 - t) * angle).sin() * one + (t * angle).sin() * two) / angle.sin()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_warp_merges_task_vectors_on_the_sphere_and_draws_them_back(count):
    init = model(0)
    policies = [near(init, seed, by=0.1) for seed in range(1, count + 1)]
    made, eta = named(salsa.warp(init, policies, 0.6)), 0.6
    for name, start in named(init).items():
        deltas = [(named(p)[name] - start).detach().double().flatten() for p in policies]
        merged = deltas[0]
        for m, delta in enumerate(deltas[1:], 1):
            merged = arc(merged, delta, 1 / (m + 1))
        expected = start.double().flatten() + eta * merged
        torch.testing.assert_close(
            made[name].double().flatten(), expected, rtol=1e-5, atol=1e-6, msg=name
        )
        if count == 2:  # what an average loses of the length, the arc keeps
            straight = (deltas[0] + deltas[1]) / 2
            assert merged.norm() > 1.05 * straight.norm()


def test_warp_at_its_ends():
    init = model(0)
    policies = [near(init, 1), near(init, 2)]
    for one, two in zip(
        named(salsa.warp(init, policies, 0.0)).items(), named(init).items(), strict=True
    ):
        assert torch.equal(one[1], two[1])
    same = salsa.warp(init, [policies[0], copy.deepcopy(policies[0])], 1.0)
    for one, two in zip(named(same).values(), named(policies[0]).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="at least one policy"):
        salsa.warp(init, [], 0.5)


def test_rewarded_soups_share_one_models_memory():
    one = model(0)
    two = near(one, 1)
    seen = []

    def score(made):
        seen.append(made)
        return made.model.norm.weight.double().sum().item()

    weights = [[1.0, 0.0], [0.25, 0.75], [0.0, 1.0]]
    found = salsa.rewarded_soups([one, two], weights, score)
    ends = [named(m)["model.norm.weight"].double().sum().item() for m in (one, two)]
    expected = [a * ends[0] + b * ends[1] for a, b in weights]
    assert found == pytest.approx(expected, rel=1e-5)
    assert seen[0] is seen[1] is seen[2]


def test_averaged_reward_models_reward_the_average():
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model(0).config)
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = AutoModelForSequenceClassification.from_config(config).eval()
    two = copy.deepcopy(one)
    two.score.weight.data.add_(1.0)  # linear in what differs
    ids = torch.randint(4, 67, (3, 6))
    made = salsa.soup([one, two], [0.25, 0.75])
    expected = 0.25 * one(input_ids=ids).logits + 0.75 * two(input_ids=ids).logits
    torch.testing.assert_close(made(input_ids=ids).logits, expected)
