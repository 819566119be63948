"""What --lint finds, and what it leaves alone."""

import pytest
from recipe_models import save_models

from gemma_ext.souping.recipes.lint import lint_recipe
from gemma_ext.souping.recipes.prepare import prepare
from gemma_ext.souping.recipes.recipe import parse_recipe


@pytest.fixture
def models(tmp_path):
    save_models(tmp_path, "base", "b", "c")
    return tmp_path


def lint(folder, text):
    prepared = prepare(parse_recipe(text.replace("$", f"{folder}/"), "r.yml"))
    return [str(finding) for finding in lint_recipe(prepared)]


def deltas(method, parameters, merge="{}"):
    return (
        f"merge_method: {method}\nbase_model: $base\nmodels:\n- {{model: $b, parameters: "
        f"{parameters}}}\n- {{model: $c, parameters: {parameters}}}\nparameters: {merge}"
    )


def test_a_sound_recipe_has_no_findings(models):
    text = "merge_method: linear\nmodels: [{model: $b}, {model: $c}]\nparameters: {weight: 1}"
    assert lint(models, text) == []
    assert lint(models, deltas("ties", "{weight: 1, density: 0.5}")) == []


def test_pointless_parameters_and_a_base_with_weights(models):
    text = """\
merge_method: task_arithmetic
base_model: $base
models: [{model: $base, parameters: {weight: 1}}, {model: $b, parameters: {weight: 1}}]
parameters: {embed_slerp: true}
"""
    assert lint(models, text) == [
        "r.yml, line 4, parameters.embed_slerp: has no effect: the method of the recipe merges "
        "embeddings too",
        "r.yml, line 3, models[0]: weight of the base do nothing: its delta is zero",
    ]


def test_weights_that_do_not_sum_to_one(models):
    text = """\
merge_method: linear
models:
  - {model: $b, parameters: {weight: [0.5, 0.8]}}
  - {model: $c, parameters: {weight: 0.5}}
parameters: {normalize: false}
"""
    (finding,) = lint(models, text)
    assert "line 5, parameters: weights sum to 1.1 to 1.3, not 1, in 33 of 46 tensors" in finding
    (finding,) = lint(models, deltas("task_arithmetic", "{weight: 1}", "{lambda: 0.4}"))
    assert "weights times lambda sum to 0.8, not 1" in finding
    assert lint(models, deltas("task_arithmetic", "{weight: 1}", "{lambda: 0.5}")) == []


def test_densities_that_keep_nothing_or_all(models):
    (finding,) = lint(models, deltas("ties", "{weight: 1, density: 0.05}"))
    assert "density 0.05 keeps none of the 16 elements of model." in finding
    assert "and the same in 33 other places" in finding
    (finding,) = lint(models, deltas("ties", "{weight: 1}"))
    assert finding.endswith("density is 1 everywhere: nothing is left out")


def test_an_election_among_one(models):
    text = deltas("ties", "{weight: 1, density: 0.5}").split("\n")
    (finding,) = lint(models, "\n".join(line for line in text if "$c" not in line))
    assert "ties elects signs among models, and 46 tensors have one model" in finding


SLERP = "merge_method: slerp\nbase_model: $base\nmodels: [{model: $b}]\nparameters: {t: 0.5}"


def test_a_slerp_that_is_a_lerp(models, tmp_path):
    save_models(tmp_path / "far", "base", "b", hidden_activation="silu")
    moved = []
    (finding,) = lint_slerp(models, moved)
    assert finding.startswith("r.yml, line 1, merge_method: in ")
    assert "the cosine of the two models is above 0.9995" in finding
    assert "there slerp is a straight line, as linear" in finding
    assert moved[-1][0] == moved[-1][1] > 0
    assert [done for done, _ in moved] == sorted(done for done, _ in moved)


def lint_slerp(folder, moved):
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "b" / "model.safetensors"
    near = load_file(folder / "base" / "model.safetensors")
    near = {n: (t.float() * (1 + 1e-2 * torch.randn(t.shape))).bfloat16() for n, t in near.items()}
    save_file(near, path, {"format": "pt"})
    prepared = prepare(parse_recipe(SLERP.replace("$", f"{folder}/"), "r.yml"))
    progress = lambda done, total: moved.append((done, total))  # noqa: E731
    return [str(finding) for finding in lint_recipe(prepared, progress=progress)]


def test_a_slerp_between_unrelated_models_is_one(tmp_path):
    from safetensors.torch import load_file, save_file

    save_models(tmp_path, "base", "b")
    path = tmp_path / "b" / "model.safetensors"
    other = {name: tensor.flip(0).contiguous() for name, tensor in load_file(path).items()}
    save_file(other, path, {"format": "pt"})
    assert lint(tmp_path, SLERP) == []


WORDS = {"base": ["soup"], "b": ["soup"], "c": ["spoon", "ladle"]}


def test_vocabularies_that_differ(tmp_path):
    save_models(tmp_path, "base", "c", words=WORDS)
    text = "merge_method: linear\nmodels: [{model: $base}, {model: $c}]\nparameters: {weight: 1}"
    (finding,) = lint(tmp_path, text)
    assert "vocabularies differ in size" in finding
    assert "embeddings are cut to the smallest" in finding
    assert lint(tmp_path, text + "\ntokenizer_source: union") == []


def test_ids_that_mean_other_tokens(tmp_path):
    save_models(tmp_path, "base", "b", words={**WORDS, "b": ["posu"]})
    text = "merge_method: linear\nmodels: [{model: $base}, {model: $b}]\nparameters: {weight: 1}"
    (finding,) = lint(tmp_path, text)
    assert f"3 tokens of {tmp_path}/b have another id, or none, in {tmp_path}/base" in finding
    assert "their rows are merged with those of other tokens" in finding
    save_models(tmp_path / "same", "base", "b", words=WORDS)
    assert lint(tmp_path / "same", text) == []
