"""Recipes run from disk to disk on tiny models; values against float64, folders by transformers."""

import json
import shutil

import pytest
import torch
import yaml
from recipe_models import generates, save_models, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gemma_ext.souping.recipes.marks import RecipeError
from gemma_ext.souping.recipes.recipe import parse_recipe, parse_recipes
from gemma_ext.souping.recipes.run import Options, run_recipe, run_recipes
from gemma_ext.souping.recipes.tokenizer import load_tokenizer

BF16 = 2.0**-8  # half a unit in the last place, relative


def run(folder, text, **options):
    """Runs a recipe whose models are named relative to `folder`."""
    recipe = parse_recipe(text.replace("$", f"{folder}/"), "r.yml")
    return run_recipe(recipe, folder / "out", Options(**options))


def config(folder):
    return json.loads((folder / "config.json").read_text())


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1.01 * BF16, atol=1e-30)


def test_linear_with_gradients_and_filters(tmp_path):
    save_models(tmp_path, "a", "b")
    out = run(
        tmp_path,
        """\
# two of a kind
merge_method: linear
models:
  - {model: $a, parameters: {weight: 1}}
  - model: $b
    parameters: {weight: [{filter: self_attn, value: [0, 3]}, {value: 1}]}
""",
    )
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    expected = {}
    for name in a:
        w = 1.0
        if "self_attn" in name:
            w = float(name.split(".")[2]) / 3 * 3
        expected[name] = (a[name] + w * b[name]) / (1 + w)
    assert_close(weights(out), expected)
    assert generates(out)
    assert config(out) == config(tmp_path / "a")
    text = (out / "mergekit_config.yml").read_text()
    assert yaml.safe_load(text)["merge_method"] == "linear"
    card = (out / "README.md").read_text()
    assert "method `linear`" in card
    assert "| `a` | source |" in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["merge", "gemma_ext"]


def test_task_vectors_with_a_base_dtype_and_shards(tmp_path):
    save_models(tmp_path, "base", "b", "c", dtype=torch.float32)
    out = run(
        tmp_path,
        """\
merge_method: task_arithmetic
base_model: $base
models: [{model: $base}, {model: $b}, {model: $c}]
parameters: {weight: 0.5, lambda: 0.8}
dtype: float32
out_dtype: bfloat16
""",
        shard_bytes=4000,
    )
    base, b, c = (weights(tmp_path / name) for name in ("base", "b", "c"))
    expected = {n: base[n] + 0.8 * (0.5 * (b[n] - base[n]) + 0.5 * (c[n] - base[n])) for n in base}
    assert_close(weights(out), expected)
    assert config(out)["dtype"] == "bfloat16"
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    assert (out / "model.safetensors.index.json").is_file()
    assert generates(out)


def test_a_stack_of_slices(tmp_path):
    save_models(tmp_path, "a", "b")
    out = run(
        tmp_path,
        """\
merge_method: passthrough
slices:
  - sources: [{model: $a, layer_range: [0, 3]}]
  - sources:
    - model: $b
      layer_range: [1, 4]
      parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1.0}]}
""",
    )
    a, b, got = weights(tmp_path / "a"), weights(tmp_path / "b"), weights(out)
    for layer, (model, own) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        for name in a:
            if name.startswith(f"model.layers.{own}."):
                scale = 0.5 if "o_proj" in name and layer >= 3 else 1.0
                new = name.replace(f"layers.{own}.", f"layers.{layer}.")
                assert torch.equal(got[new], scale * model[name])
    assert torch.equal(got["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(got["model.norm.weight"], b["model.norm.weight"])
    types = config(tmp_path / "a")["layer_types"]
    assert config(out)["num_hidden_layers"] == 6
    assert config(out)["layer_types"] == [*types[:3], *types[1:]]
    assert generates(out)


def test_gpt2_layers_are_found_too(tmp_path):
    save_models(tmp_path, "a", "b", kind="GPT2")
    text = "merge_method: passthrough\nslices:\n"
    for model, first, last in (("a", 0, 2), ("b", 1, 4)):
        text += f"- sources: [{{model: ${model}, layer_range: [{first}, {last}]}}]\n"
    out = run(tmp_path, text)
    assert config(out)["n_layer"] == 5
    assert generates(out)


def test_adapters_are_added_while_weights_are_read(tmp_path):
    peft = pytest.importorskip("peft")
    import transformers

    save_models(tmp_path, "a", "b", dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path / "lora")
    merged = {n: t.double() for n, t in wrapped.merge_and_unload().state_dict().items()}
    text = """\
merge_method: linear
parameters: {weight: 1}
models: [{model: $a}, {model: $b+LORA}]
""".replace("LORA", str(tmp_path / "lora"))
    out = run(tmp_path, text)
    a = weights(tmp_path / "a")
    got = weights(out)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, (a[name] + merged[name]) / 2, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected a model, got an adapter; write MODEL"):
        run(tmp_path, f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/lora}}]")


WORDS = {"a": ["soup", "stone"], "b": ["soup", "spoon", "ladle"]}


def rows(folder):
    """Token to its embedding, for every token."""
    embedding = weights(folder)["model.embed_tokens.weight"]
    return {t: embedding[i] for t, i in load_tokenizer(folder).get_vocab().items()}


def test_a_union_of_vocabularies(tmp_path):
    save_models(tmp_path, "a", "b", words=WORDS)
    out = run(
        tmp_path,
        """\
merge_method: linear
parameters: {weight: [{filter: embed, value: 1}, {value: 1}]}
models: [{model: $a}, {model: $b}]
tokenizer:
  source: union
  pad_to_multiple_of: 16
  tokens:
    <zero>: {source: {kind: zero}}
    stone: {source: $b, force: false}
    soup: {source: $b, force: true}
    <copy>: {source: {kind: model_token, model: $a, token: stone}}
""".replace("stone: {source: $b, force: false}\n", "\n"),
    )
    a, b, got = rows(tmp_path / "a"), rows(tmp_path / "b"), rows(out)
    assert got.keys() == a.keys() | b.keys() | {"<zero>", "<copy>"}
    for token, row in got.items():
        if token == "<zero>":
            expected = torch.zeros_like(row)
        elif token == "<copy>":
            expected = a["stone"]
        elif token == "soup":
            expected = b["soup"]
        else:  # a token that one model lacks has the other's row in both
            expected = (a.get(token, b.get(token)) + b.get(token, a.get(token))) / 2
        torch.testing.assert_close(row, expected, rtol=1.01 * BF16, atol=1e-30)
    embedding = weights(out)["model.embed_tokens.weight"]
    assert len(embedding) % 16 == 0
    assert config(out)["vocab_size"] == len(embedding)
    mean = torch.stack(list(got.values())).mean(0)
    torch.testing.assert_close(embedding[-1], mean, rtol=0.02, atol=1e-4)
    assert generates(out)


def test_the_bias_of_a_head_goes_by_token_too(tmp_path):
    save_models(tmp_path, "a", "b", kind="Phi", words=WORDS, num_key_value_heads=2)
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: $a}, {model: $b}]\n"
    out = run(tmp_path, text + "tokenizer: {source: union, pad_to_multiple_of: 32}")
    a, b, got = (
        {
            t: weights(folder)["lm_head.bias"][i]
            for t, i in load_tokenizer(folder).get_vocab().items()
        }
        for folder in (tmp_path / "a", tmp_path / "b", out)
    )
    for token, value in got.items():
        expected = (a.get(token, b.get(token)) + b.get(token, a.get(token))) / 2
        torch.testing.assert_close(value, expected, rtol=1.01 * BF16, atol=1e-30)
    assert weights(out)["lm_head.bias"].shape == (32,)
    assert generates(out)


def test_the_vocabulary_of_another_model(tmp_path):
    save_models(tmp_path, "a", "b", words={"a": WORDS["b"], "b": WORDS["a"]})
    text = """\
merge_method: ties
base_model: $a
models: [{model: $b, parameters: {weight: 1, density: 0.5}}]
tokenizer_source: $b
"""
    out = run(tmp_path, text)
    assert load_tokenizer(out).get_vocab() == load_tokenizer(tmp_path / "b").get_vocab()
    vocabulary = load_tokenizer(out).get_vocab()
    assert config(out)["eos_token_id"] == vocabulary["</s>"]
    assert generates(out)


def test_without_a_tokenizer_section_embeddings_are_cut_and_files_copied(tmp_path):
    save_models(tmp_path, "a", "b", words=WORDS)
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: $a}, {model: $b}]\n"
    out = run(tmp_path, text + "chat_template: chatml")
    least = min(config(tmp_path / name)["vocab_size"] for name in "ab")
    assert config(out)["vocab_size"] == least
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "a/tokenizer.json").read_bytes()
    assert "<|im_start|>" in load_tokenizer(out).chat_template
    other = run_recipe(
        parse_recipe(text.replace("$", f"{tmp_path}/")),
        tmp_path / "bare",
        Options(copy_tokenizer=False, card=False),
    )
    names = {path.name for path in other.iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json"}


def test_a_head_made_of_an_embedding_is_untied(tmp_path):
    save_models(tmp_path, "a")
    save_models(tmp_path, "b", tie_word_embeddings=False)
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: $a}, {model: $b}]"
    out = run(tmp_path, text)
    assert config(out)["tie_word_embeddings"] is False
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    expected = (a["model.embed_tokens.weight"] + b["lm_head.weight"]) / 2
    torch.testing.assert_close(
        weights(out)["lm_head.weight"], expected, rtol=1.01 * BF16, atol=1e-30
    )
    assert generates(out)


@pytest.mark.parametrize("tied_last", [True, False])
def test_a_stack_of_a_tied_and_an_untied_model(tmp_path, tied_last):
    save_models(tmp_path, "a", tie_word_embeddings=not tied_last)
    save_models(tmp_path, "b", "c", tie_word_embeddings=tied_last)
    out = run(
        tmp_path,
        """\
merge_method: passthrough
slices:
  - sources: [{model: $a, layer_range: [0, 2]}]
  - sources: [{model: $c, layer_range: [2, 4]}]
""",
    )
    own = "model.embed_tokens.weight" if tied_last else "lm_head.weight"
    assert torch.equal(weights(out)["lm_head.weight"], weights(tmp_path / "c")[own])
    assert config(out)["tie_word_embeddings"] is False
    assert generates(out)


def test_several_recipes_in_one_file(tmp_path):
    save_models(tmp_path, "a", "b", "c")
    text = """\
name: first
merge_method: linear
parameters: {weight: 1}
models: [{model: $a}, {model: $b}]
---
merge_method: linear
parameters: {weight: 1}
models: [{model: first}, {model: $c}]
""".replace("$", f"{tmp_path}/")
    said = []
    out = run_recipes(parse_recipes(text), tmp_path / "out", announce=said.append)
    a, b, c = (weights(tmp_path / name)["model.norm.weight"] for name in "abc")
    half = ((a + b) / 2).bfloat16().double()
    torch.testing.assert_close(
        weights(out)["model.norm.weight"], (half + c) / 2, rtol=1.01 * BF16, atol=1e-30
    )
    assert (tmp_path / "out-parts" / "first" / "config.json").is_file()
    assert said == []
    run_recipes(
        parse_recipes(text),
        tmp_path / "again",
        between=tmp_path / "out-parts",
        announce=said.append,
    )
    assert said == [f"first: {tmp_path}/out-parts/first is there"]


def test_the_seed_decides_what_is_dropped(tmp_path):
    save_models(tmp_path, "base", "b")
    text = """\
merge_method: dare_linear
base_model: $base
models: [{model: $b, parameters: {weight: 1, density: 0.5}}]
""".replace("$", f"{tmp_path}/")
    recipe = parse_recipe(text)
    outs = [
        run_recipe(recipe, tmp_path / f"out{n}", Options(seed=seed, chunk_bytes=chunk))
        for n, (seed, chunk) in enumerate([(1, 4 << 20), (1, 64), (2, 4 << 20)])
    ]
    one, same, other = ((out / "model.safetensors").read_bytes() for out in outs)
    assert one == same
    assert one != other


def test_the_recipe_and_its_sources_are_in_the_metadata(tmp_path):
    save_models(tmp_path, "a", "b")
    text = "merge_method: linear\nparameters: {weight: %s}\nmodels: [{model: $a}, {model: $b}]"
    seen = set()
    for number, weight in enumerate((1, 1, 2)):
        recipe = parse_recipe((text % weight).replace("$", f"{tmp_path}/"))
        out = run_recipe(recipe, tmp_path / f"out{number}")
        with safe_open(out / "model.safetensors", framework="pt") as file:
            seen.add(file.metadata()["gemma_ext_merge"])
    assert len(seen) == 2


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**config(folder), **values}))


LINEAR = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: $a}, {model: $b}]"


def test_models_that_do_not_go_together(tmp_path):
    save_models(tmp_path, "a")
    save_models(tmp_path, "b", kind="Llama")
    with pytest.raises(
        ValueError, match=r"b is a llama and .*a a gemma2: expected one kind of model"
    ):
        run(tmp_path, LINEAR)
    with pytest.raises(RecipeError, match=r"r\.yml, line 3, models.*has no tensor"):
        run(tmp_path, LINEAR, allow_crimes=True)


def test_a_depth_that_the_configuration_does_not_know(tmp_path):
    save_models(tmp_path, "a")
    change(tmp_path / "a", num_hidden_layers=7)
    text = "merge_method: passthrough\nslices: [{sources: [{model: $a, layer_range: [0, 2]}]}]"
    with pytest.raises(ValueError, match=r"config\.json: expected one of num_hidden_layers.* be 4"):
        run(tmp_path, text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_quantised_models_are_refused(tmp_path):
    save_models(tmp_path, "a", "b")
    change(tmp_path / "b", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"config\.json: expected plain weights, got gptq ones"):
        run(tmp_path, LINEAR)


def test_fp8_models_with_scales_are_merged_as_weights(tmp_path):
    """Out of fp8, and the output's configuration no longer says that it is."""
    save_models(tmp_path, "a", "b")
    expected = load_file(run(tmp_path, LINEAR) / "model.safetensors")
    shutil.rmtree(tmp_path / "out")
    path, name = tmp_path / "b" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    weights = load_file(path)
    scale = weights[name].abs().amax(1, keepdim=True).float() / 448
    weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
    save_file({**weights, f"{name}_scale": scale}, path, metadata={"format": "pt"})
    change(tmp_path / "b", quantization_config={"quant_method": "fp8"})
    out = run(tmp_path, LINEAR)
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert merged[name].dtype == expected[name].dtype
    torch.testing.assert_close(merged[name], expected[name], rtol=0.05, atol=1e-2)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    shutil.rmtree(out)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"b: expected the scales of fp8 '.*up_proj.*, got none"):
        run(tmp_path, LINEAR)


def test_what_cannot_be_opened(tmp_path):
    save_models(tmp_path, "a")
    with pytest.raises(RecipeError, match=r"r\.yml, line 3, models\[1\]: .*b: no such folder"):
        run(tmp_path, LINEAR)
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"expected model\.safetensors"):
        run(tmp_path, LINEAR)
    with pytest.raises(RecipeError, match=r"line 1, merge_method: .*did you mean linear"):
        run(tmp_path, LINEAR.replace("linear", "linaer"))
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"line 3, models\[0\]: .*config\.json: expected JSON"):
        run(tmp_path, LINEAR.replace("$b", "$a", 1).replace(", {model: $a}", ""))
    assert not (tmp_path / "out").exists()


def test_a_base_and_a_tokenizer_that_are_not_there(tmp_path):
    save_models(tmp_path, "a", "b")
    text = "merge_method: ties\nbase_model: $c\nmodels: [{model: $a}]\nparameters: {weight: 1}"
    with pytest.raises(RecipeError, match=r"r\.yml, line 2, base_model: .*c: no such folder"):
        run(tmp_path, text)
    with pytest.raises(RecipeError, match=r"line 4, tokenizer_source: .*beside the weights, got"):
        run(tmp_path, LINEAR + "\ntokenizer_source: union")
