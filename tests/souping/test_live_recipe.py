"""Recipes run into a model that is in use."""

from __future__ import annotations

import pytest
import torch
import transformers
from recipe_models import save_models
from safetensors.torch import load_file

from gemma_ext.souping import Swap
from gemma_ext.souping.recipes.recipe import parse_recipe
from gemma_ext.souping.recipes.run import Options, run_recipe

RECIPES = {
    "linear": """
merge_method: linear
models:
  - {model: $a, parameters: {weight: [0.2, 0.9]}}
  - {model: $b, parameters: {weight: 0.5}}
""",
    "dare_ties": """
merge_method: dare_ties
base_model: $base
models:
  - {model: $a, parameters: {weight: 0.6, density: 0.5}}
  - {model: $b, parameters: {weight: 0.4, density: [0.3, 0.9]}}
""",
    "ties_ref": """
merge_method: ties_ref
base_model: $base
models:
  - {model: $a, parameters: {density: 0.3}}
  - {model: $b, parameters: {density: 0.5}}
""",
    "passthrough": """
merge_method: passthrough
slices:
  - sources: [{model: $a, layer_range: [0, 2]}]
  - sources: [{model: $b, layer_range: [2, 4]}]
""",
}


@pytest.fixture
def folder(tmp_path):
    save_models(tmp_path, "base", "a", "b")
    return tmp_path


def recipe_of(text, folder):
    return parse_recipe(text.replace("$", f"{folder}/"), "r.yml")


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_same_weights_as_on_disk(folder, name):
    recipe = recipe_of(RECIPES[name], folder)
    out = load_file(run_recipe(recipe, folder / "out", Options(seed=3)) / "model.safetensors")
    model = load(folder / "base")
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    with Swap(model) as swap:
        swap.recipe(recipe, Options(seed=3))
        for n, p in model.named_parameters():
            assert torch.equal(p, out[n]), n
        assert any(not torch.equal(p, own[n]) for n, p in model.named_parameters())
    for n, p in model.named_parameters():
        assert torch.equal(p, own[n])


def test_recipe_of_other_shapes_is_refused_and_nothing_changes(folder):
    longer = RECIPES["passthrough"].replace("[2, 4]", "[1, 4]")
    model = load(folder / "base")
    swap = Swap(model)
    with pytest.raises(
        ValueError, match=r"expected tensors of the model alone in .* got model.layers.4"
    ):
        swap.recipe(recipe_of(longer, folder))
    shorter = RECIPES["passthrough"].replace("[2, 4]", "[2, 3]")
    with pytest.raises(ValueError, match=r"expected model.layers.3.* in the merge, got none"):
        swap.recipe(recipe_of(shorter, folder))
    save_models(folder, "a", vocab_size=48)
    with pytest.raises(ValueError, match=r"embed_tokens.weight of the merge to be \[40, 16\]"):
        swap.recipe(recipe_of("merge_method: passthrough\nmodels: [{model: $a}]", folder))
    own = load(folder / "base")
    for n, p in model.named_parameters():
        assert torch.equal(p, own.get_parameter(n))
    assert swap.own is None
