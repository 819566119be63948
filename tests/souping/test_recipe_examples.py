"""Recipes as people write them, each run on tiny models or refused with line and key.

The first line of each file in `recipes/` says which; the models that it names are made here.
"""

import re
from pathlib import Path

import pytest
import torch
import yaml
from recipe_models import generates, save_models, weights
from tiny_tokenizers import save_bpe

from gemma_ext.souping.method import Required
from gemma_ext.souping.methods import METHODS
from gemma_ext.souping.recipes.marks import RecipeError
from gemma_ext.souping.recipes.recipe import read_recipes
from gemma_ext.souping.recipes.run import run_recipes

RECIPES = sorted((Path(__file__).parent / "recipes").glob("*.yml"))
NAMES = [f"kitchen/broth-2b{end}" for end in ("", "-chat", "-code", "-math", "-story", "-toxic")]
SPECIALS = {"-chat": ("<s>", "</s>", "<|im_start|>", "<|im_end|>"), "-story": ("<s>", "</s>")}


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """Folders by the names that the recipes use."""
    peft = pytest.importorskip("peft")
    import transformers

    root = tmp_path_factory.mktemp("kitchen")
    folders = {name: root / name for name in NAMES}
    for name in NAMES:
        end = name.removeprefix("kitchen/broth-2b")
        words = ["soup", "stone"] if end != "-story" else ["soup", "tale"]
        template = "{{ bos_token }}" if end else None
        save_bpe(folders[name], words, SPECIALS.get(end, ("<s>", "</s>")), template)
    save_models(root, *NAMES, num_hidden_layers=6, vocab_size=24)
    base = transformers.AutoModelForCausalLM.from_pretrained(folders["kitchen/broth-2b"])
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(0)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folders["kitchen/pepper-lora"] = root / "pepper"
    lora.save_pretrained(folders["kitchen/pepper-lora"])
    return folders


def run(path, kitchen, out, monkeypatch):
    from gemma_ext.souping.recipes import models

    found = models.locate
    monkeypatch.setattr(
        models, "locate", lambda place, cache=None: kitchen.get(str(place)) or found(place, cache)
    )
    return run_recipes(read_recipes(path), out)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, kitchen, tmp_path, monkeypatch):
    verdict = path.read_text().split("\n")[0].removeprefix("# ")
    if verdict == "runs":
        out = run(path, kitchen, tmp_path / "out", monkeypatch)
        assert generates(out)
        assert (out / "tokenizer.json").is_file()
        again = run(path, kitchen, tmp_path / "again", monkeypatch)
        for file in out.glob("model*"):
            assert file.read_bytes() == (again / file.name).read_bytes()
        return
    expected = verdict.removeprefix("refused: ")
    with pytest.raises(RecipeError) as error:
        run(path, kitchen, tmp_path / "out", monkeypatch)
    assert expected in str(error.value)
    assert str(error.value).startswith(f"{path}, line ")
    assert not (tmp_path / "out").exists()


def test_there_are_enough_of_both_kinds():
    verdicts = [path.read_text().split("\n")[0] for path in RECIPES]
    assert all(re.match("# (runs$|refused: line)", verdict) for verdict in verdicts)
    assert len(RECIPES) >= 25
    assert sum(verdict == "# runs" for verdict in verdicts) >= 20


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_runs_from_a_recipe(name, kitchen, tmp_path, monkeypatch):
    method = METHODS[name]
    sources = NAMES[1:3] if method.models[1] != 1 else NAMES[1:2]
    required = [p for p in method.parameters if p.default is Required]
    needed = {p.key: 0 if p.kind is int else 0.3 for p in required}
    recipe = {
        "merge_method": name,
        "models": [{"model": source} for source in sources],
        "parameters": needed,
        **({"base_model": NAMES[0]} if method.base == "needed" else {}),
    }
    path = tmp_path / "r.yml"
    path.write_text(yaml.safe_dump(recipe))
    files = [p.key for p in method.parameters if p.per_model and p.kind is str]
    if files:  # statistics of each model, which only other commands make
        with pytest.raises(ValueError, match=f"expected {files[0]} of every model"):
            run(path, kitchen, tmp_path / "out", monkeypatch)
        assert not (tmp_path / "out").exists()
        return
    out = run(path, kitchen, tmp_path / "out", monkeypatch)
    assert all(bool(tensor.isfinite().all()) for tensor in weights(out).values())
    assert generates(out)
