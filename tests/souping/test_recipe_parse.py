"""Recipes as text: what is read, and the sentence with file, line and key for what is not."""

import pytest

from gemma_ext.souping.recipes.marks import RecipeError
from gemma_ext.souping.recipes.recipe import parse_recipe, parse_recipes, read_recipes
from gemma_ext.souping.recipes.references import Location, ModelReference, locate, parse_reference

TWO = "models: [{model: a}, {model: b}]\n"


def test_every_key_of_a_recipe_is_read(tmp_path):
    path = tmp_path / "all.yml"
    path.write_text("""\
merge_method: ties
base_model: {model: {path: base, revision: v1}, lora: {path: fix}}
dtype: torch.bfloat16
out_dtype: float16
chat_template: chatml
parameters: {normalize: true}
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    <a>: {source: org/m@main, force: true}
    <b>: {source: {kind: model_token, model: org/m, token: <c>}}
    <d>: {source: {kind: model_token, model: org/m, token_id: 7}}
    <e>: {source: {kind: zero}}
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: org/m@main+fix@v2, layer_range: [1, 3], parameters: {weight: [0, 1]}}
    base_model: base
    residual_weight: 0.5
    parameters: {density: 0.5}
""")
    (recipe,) = read_recipes(path)
    assert (recipe.method, recipe.dtype, recipe.out_dtype) == ("ties", "bfloat16", "float16")
    assert recipe.base == ModelReference(Location("base", "v1"), Location("fix"))
    assert recipe.chat_template == "chatml"
    assert recipe.settings["normalize"].scalar is True
    (module,) = recipe.modules
    assert module.sliced
    (part,) = module.slices
    assert part.base == ModelReference(Location("base"))
    assert part.settings["density"].scalar == 0.5
    first, second = part.sources
    assert (first.layers, second.layers) == ((0, 2), (1, 3))
    assert second.model == ModelReference(Location("org/m", "main"), Location("fix", "v2"))
    assert second.settings["weight"].gradient == (0, 1)
    tokens = recipe.tokenizer.tokens
    assert recipe.tokenizer.source == "union"
    assert recipe.tokenizer.pad == 64
    kinds = [(rule.kind, rule.token, rule.force) for rule in tokens.values()]
    assert kinds == [
        ("model", None, True),
        ("model_token", "<c>", False),
        ("model_token", 7, False),
        ("zero", None, False),
    ]
    assert [str(m) for m in recipe.models()] == ["base", "org/m@main+fix@v2", "base@v1+fix"]


def test_modules_nulls_and_merge_keys():
    recipe = parse_recipe("""\
merge_method: linear
dtype:
tokenizer: null
modules:
  encoder:
    models: &two
      - {model: a, parameters: {weight: 1}}
      - {model: b, parameters: null}
    parameters: {weight: 2}
  decoder: {models: *two}
""")
    assert [module.name for module in recipe.modules] == ["encoder", "decoder"]
    assert recipe.dtype is None
    assert recipe.tokenizer is None
    assert recipe.modules[0].settings["weight"].scalar == 2
    assert recipe.modules[1].slices[0].sources[1].settings == {}
    merged = parse_recipe("""\
merge_method: linear
models:
  - {model: a, parameters: &same {weight: 1, other: 2}}
  - {model: b, parameters: {<<: *same, weight: 3}}
""")
    settings = merged.modules[0].slices[0].sources[1].settings
    assert {key: value.scalar for key, value in settings.items()} == {"weight": 3, "other": 2}


def test_plain_data_is_a_recipe_too():
    data = {"merge_method": "linear", "models": [{"model": "a", "parameters": None}], "dtype": None}
    assert parse_recipe(data).models() == [ModelReference(Location("a"))]


@pytest.mark.parametrize(
    ("text", "source"),
    [("tokenizer_source: union", "union"), ("tokenizer_source: base", "base")],
)
def test_old_tokenizer_source(text, source):
    assert parse_recipe(f"merge_method: x\n{TWO}{text}").tokenizer.source == source
    model = parse_recipe(f"merge_method: x\n{TWO}tokenizer_source: model:a").tokenizer.source
    assert model == ModelReference(Location("a"))


def test_several_recipes_come_in_the_order_of_their_needs():
    text = """\
name: second
merge_method: x
models: [{model: first}, {model: c}]
---
name: first
merge_method: x
models: [{model: a}, {model: b}]
---
merge_method: x
models: [{model: second}, {model: a}]
"""
    assert [recipe.name for recipe in parse_recipes(text)] == ["first", "second", None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yml: expected a recipe, got nothing"),
        ("a: [", "r.yml, line 1: not YAML"),
        ("[1]", "r.yml, line 1: expected keys with values, got a list"),
        (TWO, "line 1: expected merge_method among the keys"),
        ("merge_method: x\n", "expected exactly one of models, slices and modules, got none"),
        (f"merge_method: x\n{TWO}slices: []", "got models and slices"),
        (f"merge_method: x\n{TWO}merge_method: y", "line 3, merge_method: given twice"),
        (f"merge_metod: x\n{TWO}", "line 1, merge_metod: unknown key; did you mean merge_method?"),
        (f"merge_method: x\n{TWO}dtype: int64", "line 3, dtype: expected one of float32, bfloat16"),
        ("merge_method: x\nmodels: []", "line 2, models: expected at least one, got an empty list"),
        ("merge_method: x\nmodels: a", "line 2, models: expected a list, got 'a'"),
        ("merge_method: x\nmodels: [{}]", "models[0]: expected model among the keys"),
        ("merge_method: x\nmodels: [{model: a}, {model: a}]", "models[1]: a is listed twice"),
        (
            "merge_method: x\nmodels: [{model: a, weight: 1}]",
            "models[0].weight: unknown key; expected one of model, parameters",
        ),
        ("merge_method: x\nmodels: [{model: '+b'}]", "models[0].model: expected path[@revision]"),
        ("merge_method: x\nmodels: [{model: {lora: b}}]", "expected model or path among the keys"),
        (
            "merge_method: x\nmodels: [{model: {model: a, override_architecture: B}}]",
            "models[0].model.override_architecture: not supported",
        ),
        ("merge_method: x\nslices: [{}]", "slices[0]: expected sources among the keys"),
        (
            "merge_method: x\nslices: [{sources: [{model: a}]}]",
            "slices[0].sources[0]: expected layer_range among the keys",
        ),
        (
            "merge_method: x\nslices: [{sources: [{model: a, layer_range: [4, 2]}]}]",
            "slices[0].sources[0].layer_range: expected [first, one past the last]",
        ),
        (
            "merge_method: x\nslices: [{sources: [{model: a, layer_range: [0, x]}]}]",
            "layer_range[1]: expected a whole number, got 'x'",
        ),
        (
            "merge_method: x\nslices:\n- sources: [{model: a, layer_range: [0, 2]},"
            " {model: b, layer_range: [0, 3]}]",
            "line 3, slices[0].sources: expected layer ranges of one length, got [2, 3]",
        ),
        ("merge_method: x\nmodules: {a: {}}", "modules.a: expected exactly one of models and"),
        (
            f"merge_method: x\n{TWO}tokenizer_source: base\ntokenizer: {{}}",
            "line 3, tokenizer_source: expected tokenizer or tokenizer_source, got both",
        ),
        (
            f"merge_method: x\n{TWO}tokenizer: {{pad_to_multiple_of: 0}}",
            "tokenizer.pad_to_multiple_of: expected at least 1, got 0",
        ),
        (
            f"merge_method: x\n{TWO}tokenizer: {{tokens: {{<a>: {{}}}}}}",
            "tokenizer.tokens.<a>: expected source among the keys",
        ),
        (
            f"merge_method: x\n{TWO}tokenizer: {{tokens: {{a: {{source: {{kind: one}}}}}}}}",
            "tokens.a.source.kind: expected one of model_token, zero, got one",
        ),
        (
            f"merge_method: x\n{TWO}tokenizer: {{tokens: {{a: {{source: "
            "{kind: model_token, model: m}}}}",
            "tokens.a.source: expected model and one of token and token_id",
        ),
        (
            f"merge_method: x\n{TWO}tokenizer: {{tokens: {{a: {{source: m, force: 1}}}}}}",
            "tokens.a.force: expected true or false, got 1",
        ),
        (f"merge_method: x\n{TWO}chat_template: gemma", "chat_template: expected auto, one of"),
        (f"merge_method: x\n{TWO}? [a]\n: 1", "line 3: expected text as a key"),
        (
            f"merge_method: x\n{TWO}---\nmerge_method: x\n{TWO}",
            "line 1: expected a name: only the last of several recipes has none",
        ),
        (
            f"merge_method: x\n{TWO}name: n\n---\nmerge_method: x\n{TWO}name: n",
            "line 7, name: n is the name of an earlier recipe",
        ),
        ("merge_method: x\nname: n\nmodels: [{model: n}]", "line 1: n is made of itself"),
    ],
)
def test_what_is_refused_and_where(text, message):
    with pytest.raises(RecipeError) as error:
        parse_recipes(text, "r.yml")
    assert message in str(error.value)
    assert str(error.value).startswith("r.yml")


def test_parse_recipe_takes_one():
    text = f"name: n\nmerge_method: x\n{TWO}---\nmerge_method: x\n{TWO}"
    with pytest.raises(RecipeError, match="expected one recipe, got 2"):
        parse_recipe(text)


@pytest.mark.parametrize("text", ["org/m", "org/m@v1", "/a/b+c", "org/m@v1+org/l@v2"])
def test_references_read_as_they_are_written(text):
    assert str(parse_reference(text)) == text


def test_a_folder_with_plus_and_at_in_its_name_is_one(tmp_path):
    folder = tmp_path / "a+b@c"
    folder.mkdir()
    assert parse_reference(str(folder)) == ModelReference(Location(str(folder)))
    assert locate(Location(str(folder))) == folder


def test_places_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^\./nowhere: no such folder$"):
        locate(Location("./nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="expected a folder with a model, got a file"):
        locate(Location(str(tmp_path / "file")))


def test_a_repository_is_found_in_the_hub_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--m" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--org--m" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    assert locate(Location("org/m"), str(tmp_path)) == snapshot
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as error:
        locate(Location("org/other", "v3"), str(tmp_path))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("org/other@v3: no such folder, not in the cache of the hub")
