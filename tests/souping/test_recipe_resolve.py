"""Recipes held against methods and the tensors of models."""

from typing import ClassVar

import pytest

from gemma_ext.souping.method import Method, Parameter
from gemma_ext.souping.recipes.evaluate import check_recipe, pointless
from gemma_ext.souping.recipes.layout import read_layout, split_modules
from gemma_ext.souping.recipes.marks import RecipeError
from gemma_ext.souping.recipes.recipe import parse_recipe
from gemma_ext.souping.recipes.resolve import Input, resolve


class Soup(Method):
    name = "soup"
    parameters = (
        Parameter("weight", per_model=True),
        Parameter("normalize", True, kind=bool),
        Parameter("steps", 3, kind=int),
        Parameter("mode", "a", kind=str),
    )


class Deltas(Method):
    name = "deltas"
    base = "needed"
    parameters = (Parameter("weight", 1.0, per_model=True), Parameter("lambda", 1.0))


class Pair(Method):
    name = "pair"
    base = "optional"
    models: ClassVar = (2, 2)
    parameters = (Parameter("t", 0.5),)


class Copy(Method):
    name = "copy"
    models: ClassVar = (1, 1)


def tensors(layers=3, vocab=11, width=4, prefix="model", head=True):
    shapes = {f"{prefix}.embed_tokens.weight": (vocab, width), f"{prefix}.norm.weight": (width,)}
    for layer in range(layers):
        shapes[f"{prefix}.layers.{layer}.self_attn.q_proj.weight"] = (width, width)
        shapes[f"{prefix}.layers.{layer}.mlp.up_proj.weight"] = (5, width)
    if head:
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


def run(text, method, *shapes, **options):
    recipe = parse_recipe(text, "r.yml")
    check_recipe(recipe, method)
    found = resolve(recipe, method, [read_layout(own) for own in shapes], **options)
    return {target.info.name: target for target in found}


def test_whole_models_with_gradients_filters_and_levels():
    targets = run(
        """\
merge_method: soup
parameters: {weight: 9, steps: 4}
models:
  - model: a
    parameters: {weight: [{filter: mlp, value: [0, 1]}, {filter: q_proj, value: 2}]}
  - {model: b, parameters: {weight: [1, 3]}}
""",
        Soup,
        tensors(),
        tensors(),
        seed=5,
    )
    assert list(targets) == sorted(tensors())
    weights = {name: target.values.of("weight") for name, target in targets.items()}
    assert [weights[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(3)] == [
        [0, 1],
        [0.5, 2],
        [1, 3],
    ]
    assert weights["model.layers.1.self_attn.q_proj.weight"] == [2, 2]
    for outside in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert weights[outside] == [9, 1]  # no filter fits: the next level; depth is 0
    target = targets["model.layers.2.mlp.up_proj.weight"]
    assert target.values.merge == {"normalize": True, "steps": 4, "mode": "a"}
    assert target.values.seed == 5
    assert (target.info.layer, target.info.layers, target.info.shape) == (2, 3, (5, 4))
    assert targets["model.norm.weight"].info.layer is None
    assert target.sources == (Input(0, target.info.name), Input(1, target.info.name))
    assert target.base is None


def test_one_layer_stands_at_the_end_of_a_gradient():
    text = "merge_method: soup\nmodels: [{model: a, parameters: {weight: [0, 1]}}]"
    targets = run(text, Soup, tensors(1))
    assert targets["model.layers.0.mlp.up_proj.weight"].values.of("weight") == [1]


def test_slices_renumber_layers_and_take_their_ends_from_the_outer_ones():
    targets = run(
        """\
merge_method: copy
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 4]}]
  - sources: [{model: c, layer_range: [2, 3]}]
""",
        Copy,
        tensors(3),
        tensors(4),
        tensors(5),
    )
    inputs = {name: target.sources[0] for name, target in targets.items()}
    q = "model.layers.{}.self_attn.q_proj.weight"
    places = [(0, 0), (0, 1), (1, 1), (1, 2), (1, 3), (2, 2)]
    assert [inputs[q.format(n)] for n in range(6)] == [Input(m, q.format(k)) for m, k in places]
    assert inputs["model.embed_tokens.weight"].model == 0
    assert inputs["model.norm.weight"].model == 2
    assert inputs["lm_head.weight"].model == 2
    assert len(targets) == 3 + 2 * 6
    assert {target.info.layers for target in targets.values()} == {0, 6}


def test_gradients_run_within_a_slice():
    text = """\
merge_method: soup
parameters: {weight: [0, 1]}
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: a, layer_range: [0, 3], parameters: {weight: 7}}]
    parameters: {mode: x}
"""
    targets = run(text, Soup, tensors(3))
    up = [targets[f"model.layers.{n}.mlp.up_proj.weight"].values for n in range(6)]
    assert [values.of("weight")[0] for values in up] == [0, 0.5, 1, 7, 7, 7]
    assert [values.merge["mode"] for values in up] == ["a"] * 3 + ["x"] * 3


@pytest.mark.parametrize("listed", ["{model: base}, ", ""])
def test_a_base_is_no_source_of_a_method_of_deltas(listed):
    text = f"merge_method: deltas\nbase_model: base\nmodels: [{listed}{{model: a}}, {{model: b}}]"
    target = run(text, Deltas, tensors(), tensors(), tensors())["model.norm.weight"]
    names = [str(model) for model in parse_recipe(text).models()]
    assert target.base == Input(names.index("base"), "model.norm.weight")
    assert [names[source.model] for source in target.sources] == ["a", "b"]
    assert len(target.values.models) == 2


def test_the_base_of_a_slice_has_its_layers():
    text = """\
merge_method: deltas
slices:
  - base_model: base
    sources: [{model: a, layer_range: [1, 3]}, {model: base, layer_range: [0, 2]}]
  - base_model: base
    sources: [{model: a, layer_range: [2, 3]}]
"""
    targets = run(text, Deltas, tensors(3), tensors(3))
    up = [targets[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(3)]
    assert [target.sources[0].name.split(".")[2] for target in up] == ["1", "2", "2"]
    assert [target.base.name.split(".")[2] for target in up] == ["0", "1", "2"]


def test_a_base_counts_as_a_model_of_a_method_without_one():
    text = "merge_method: soup\nbase_model: b\nparameters: {weight: 1}\nmodels: [{model: a}]"
    target = run(text, Soup, tensors(), tensors())["model.norm.weight"]
    assert [source.model for source in target.sources] == [0, 1]
    with pytest.raises(RecipeError) as error:
        run(
            "merge_method: soup\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]",
            Soup,
            tensors(),
            tensors(),
        )
    assert str(error.value).startswith(
        "r.yml, line 2, base_model: soup needs weight for b, because"
    )


def test_a_head_that_is_not_stored_is_the_embedding():
    text = "merge_method: soup\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]"
    targets = run(text, Soup, tensors(head=False), tensors())
    assert targets["lm_head.weight"].sources == (
        Input(0, "model.embed_tokens.weight"),
        Input(1, "lm_head.weight"),
    )
    assert "lm_head.weight" not in run(text, Soup, tensors(head=False), tensors(head=False))


def test_vocabularies_are_cut_to_the_smallest():
    text = "merge_method: soup\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]"
    targets = run(text, Soup, tensors(vocab=11), tensors(vocab=9))
    assert targets["model.embed_tokens.weight"].info.shape == (9, 4)


def test_modules_are_parts_of_names():
    vision = {f"vision_tower.encoder.layers.{n}.fc.weight": (3, 3) for n in range(2)}
    shapes = {**tensors(prefix="language_model.model"), **vision, "projector.weight": (2, 2)}
    text = """\
merge_method: soup
modules:
  text_decoder:
    models: [{model: a, parameters: {weight: [0, 1]}}, {model: b, parameters: {weight: 1}}]
  vision_tower:
    slices: [{sources: [{model: b, layer_range: [1, 2]}]}]
    parameters: {weight: 3}
"""
    targets = run(text, Soup, shapes, shapes)
    assert set(targets) == {name for name in shapes if "encoder.layers.1" not in name}
    tower = targets["vision_tower.encoder.layers.0.fc.weight"]
    assert tower.sources == (Input(1, "vision_tower.encoder.layers.1.fc.weight"),)
    assert tower.values.of("weight") == [3]
    middle = targets["language_model.model.layers.1.mlp.up_proj.weight"]
    assert middle.values.of("weight") == [0.5, 1]
    assert len(targets["projector.weight"].sources) == 2


def test_other_stacks_have_a_depth_of_their_own():
    shapes = {**tensors(5), **{f"tower.blocks.{n}.w": (2, 2) for n in range(3)}, "seq.2.w": (9, 9)}
    text = "merge_method: soup\nmodels: [{model: a, parameters: {weight: [0, 1]}}]"
    targets = run(text, Soup, shapes)
    values = [targets[f"tower.blocks.{n}.w"].values.of("weight")[0] for n in range(3)]
    assert values == [0, 0.5, 1]
    assert targets["seq.2.w"].values.of("weight") == [0]
    assert targets["tower.blocks.1.w"].info.layer is None


def test_layouts_of_other_families():
    gpt2 = read_layout({f"transformer.h.{n}.attn.c_attn.weight": (4, 12) for n in range(2)})
    assert (gpt2.main, gpt2.layers) == ("transformer.h", 2)
    experts = {
        f"model.layers.{n}.mlp.experts.{k}.w.weight": (4, 4) for n in range(2) for k in range(3)
    }
    assert read_layout(experts).layers == 2
    assert read_layout({"w": (1,)}).layers == 0
    assert split_modules(["a.b.w", "c.w"], ["b", "decoder"]) == {"b": ["a.b.w"], "decoder": ["c.w"]}
    with pytest.raises(ValueError, match=r"none of the modules b has the tensor c\.w"):
        split_modules(["a.b.w", "c.w"], ["b"])
    with pytest.raises(ValueError, match="no tensor is named after the module x; names begin with"):
        split_modules(["a.b.w"], ["x", "decoder"])


def test_computed_buffers_of_old_checkpoints_are_left_out():
    old = {**tensors(), "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    text = "merge_method: soup\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]"
    assert set(run(text, Soup, old, tensors())) == set(tensors())


def test_pointless_parameters_are_accepted_and_named():
    text = "merge_method: copy\nmodels: [{model: a}]\nparameters: {int8_mask: true}"
    recipe = parse_recipe(text, "r.yml")
    check_recipe(recipe, Copy)
    ((entry, reason),) = pointless(recipe)
    assert entry.place == "r.yml, line 3, parameters.int8_mask"
    assert reason == "no mask is ever stored"


W = "parameters: {weight: 1}"


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        (Soup, "models: [{model: a, parameters: {wieght: 1}}]", "did you mean weight?"),
        (Copy, f"models: [{{model: a, {W}}}]", "copy has no parameter weight; it has none"),
        (
            Soup,
            "models: [{model: a, parameters: {normalize: true}}]",
            "models[0].parameters.normalize: normalize is of the whole merge",
        ),
        (Soup, "models: [{model: a, parameters: {weight: x}}]", "weight: expected a number, got"),
        (
            Soup,
            "models: [{model: a}]\nparameters:\n  weight:\n  - {filter: a, value: [1, true]}",
            "line 5, parameters.weight[0].value[1]: expected a number, got True",
        ),
        (Soup, f"models: [{{model: a}}]\n{W[:-1]}, steps: 1.5}}", "steps: expected a whole number"),
        (
            Soup,
            f"models: [{{model: a}}]\n{W[:-1]}, normalize: 2}}",
            "expected true or false, got 2",
        ),
        (Soup, f"models: [{{model: a}}]\n{W[:-1]}, mode: 2}}", "mode: expected text, got 2"),
        (Soup, "models: [{model: a}]", "line 2, models[0]: soup needs weight for a"),
        (Deltas, "models: [{model: a}]", "line 2, models: deltas needs a base_model"),
        (
            Deltas,
            "models: [{model: a}]\nbase_model: a",
            "line 2, models: deltas merges 1 or more models beside the base, got 0",
        ),
        (Pair, "models: [{model: a}]", "line 2, models: pair merges 2 models, got 1"),
        (Copy, "models: [{model: a}, {model: b}]", "copy merges 1 model, got 2"),
        (
            Copy,
            "slices: [{sources: [{model: a, layer_range: [2, 4]}]}]",
            "slices[0].sources[0]: layer_range: a has 3 layers, got [2, 4]",
        ),
        (
            Deltas,
            "base_model: b\nslices: [{sources: [{model: a, layer_range: [0, 1]},"
            " {model: c, layer_range: [1, 2]}]}]",
            "slices[0]: expected the base b among the sources, because their layers differ",
        ),
        (
            Copy,
            "modules: {x: {models: [{model: a}]}}",
            "line 2, modules.x: none of the modules x has the tensor",
        ),
    ],
)
def test_what_is_refused_and_where(method, text, message):
    with pytest.raises(RecipeError) as error:
        run(f"merge_method: {method.name}\n{text}", method, tensors(), tensors(), tensors())
    assert message in str(error.value)
    assert str(error.value).startswith("r.yml, line ")


def test_models_that_do_not_match():
    text = "merge_method: soup\nmodels:\n- {model: a}\n- {model: b}\nparameters: {weight: 1}"
    with pytest.raises(RecipeError) as error:
        run(text, Soup, tensors(3), tensors(2))
    assert "line 4, models[1]: b has 2 layers and a has 3: expected as many" in str(error.value)
    with pytest.raises(RecipeError) as error:
        run(text, Soup, tensors(), {n: s for n, s in tensors().items() if n != "model.norm.weight"})
    assert "models[1]: b has no tensor model.norm.weight, which a has" in str(error.value)
    wide = {**tensors(), "model.norm.weight": (5,)}
    with pytest.raises(RecipeError) as error:
        run(text, Soup, tensors(), wide)
    assert "model.norm.weight has shape [5] in b and [4] in a" in str(error.value)
    assert run(text, Soup, tensors(), wide, skip=True)["model.norm.weight"].info.shape == (4,)
    base = "merge_method: deltas\nmodels: [{model: a}]\nbase_model: b"
    with pytest.raises(RecipeError, match="the base b has 2 layers, the sources have 3"):
        run(base, Deltas, tensors(3), tensors(2))
