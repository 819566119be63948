"""The page of --explain: its numbers against the formulas, and that it stands alone."""

import re

import pytest
import torch
from recipe_models import save_models, weights

from gemma_ext.souping.recipes.explain import explain_recipe
from gemma_ext.souping.recipes.measure import measure, weighted_mean
from gemma_ext.souping.recipes.prepare import prepare
from gemma_ext.souping.recipes.recipe import parse_recipe

TIES = """\
merge_method: ties
base_model: $base
models:
  - {model: $b, parameters: {weight: 1, density: [0.2, 0.6]}}
  - {model: $c, parameters: {weight: 1, density: 0.5}}
"""
LINEAR = "merge_method: linear\nmodels: [{model: $base}, {model: $b}]\nparameters: {weight: 1}"


def opened(folder, text):
    return prepare(parse_recipe(text.replace("$", f"{folder}/"), "r.yml"))


@pytest.fixture
def models(tmp_path):
    save_models(tmp_path, "base", "b", "c")
    return tmp_path


def test_measures_are_those_of_the_formulas(models):
    base, b, c = (weights(models / name) for name in ("base", "b", "c"))
    for target in opened(models, TIES).targets:
        found, name = measure(target), target.info.name
        deltas = torch.stack([(b[name] - base[name]).view(-1), (c[name] - base[name]).view(-1)])
        torch.testing.assert_close(found.gram, deltas @ deltas.T, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found.norms, deltas.norm(dim=1), rtol=1e-12, atol=0)
        cosine = torch.nn.functional.cosine_similarity(*deltas, dim=0)
        torch.testing.assert_close(found.cosines[0, 1], cosine, rtol=1e-12, atol=1e-12)
        assert found.base_norm == pytest.approx(float(base[name].norm()), rel=1e-12)
        any_changed = (deltas != 0).any(0).sum()
        opposed = ((deltas > 0).any(0) & (deltas < 0).any(0)).sum()
        assert found.conflicts == pytest.approx(float(opposed / any_changed))
        torch.testing.assert_close(found.changed, (deltas != 0).double().mean(1))


def test_without_a_base_the_models_themselves_are_measured(models):
    base, b = weights(models / "base"), weights(models / "b")
    target = opened(models, LINEAR).targets[0]
    found, name = measure(target), target.info.name
    assert float(found.gram[0, 1]) == pytest.approx(float((base[name] * b[name]).sum()))
    assert found.conflicts is None
    assert found.changed is None


@pytest.mark.parametrize(("text", "plots"), [(TIES, 4), (LINEAR, 2)])
def test_the_page_stands_alone(models, text, plots):
    prepared, seen = opened(models, text), []
    path = models / "deep" / "page.html"
    explain_recipe(prepared, path, progress=lambda done, total: seen.append((done, total)))
    page = path.read_text()
    assert page.count("<svg") == plots
    assert not re.findall(r'(?:src|href)="([^"#]+)"', page.replace("xlink:href", "x"))
    for target in prepared.targets:
        assert f"<td>{target.info.name}</td>" in page
    assert "merge_method" in page
    assert seen[-1][0] == seen[-1][1]
    if text is TIES:
        assert "39.9 % 49.9 %" in page or "40.0 % 50.0 %" in page or " 50.0 %" in page
        assert "opposite signs" in page


def test_a_recipe_that_copies_has_nothing_to_explain(models):
    prepared = opened(models, "merge_method: passthrough\nmodels: [{model: $b}]")
    with pytest.raises(ValueError, match="expected tensors that are merged, got none"):
        explain_recipe(prepared, models / "page.html")


def test_means_leave_out_what_is_no_number():
    assert weighted_mean([1.0, float("nan"), 3.0], [1, 5, 3]) == 2.5
    assert str(weighted_mean([float("nan")], [1])) == "nan"
