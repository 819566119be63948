"""What every merge method must give whatever the numbers are."""

from __future__ import annotations

import pytest
import torch
from merge_oracle import SHAPES, assert_near, assert_same, family, run, tensors

from gemma_ext.souping.methods import METHODS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRIMS = ("ties", "ties_row", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
         "breadcrumbs_ties")  # fmt: skip
SCALED = (*TRIMS, "task_arithmetic", "ties_ref", "ties_mergelm", "ties_ls", "magmax", "consensus",
          "tsv", "iso_c")  # fmt: skip
LINEAR_TRIMS = ("dare_linear", "della_linear", "breadcrumbs")
REQUIRED = {"weight": 0.7, "t": 0.3, "task": 0, "density": 0.4, "tall_lambda": 0.4}


def required(name: str, **more: object) -> dict[str, object]:
    """Values for what the method wants, with a density that drops something."""
    keys = {parameter.key for parameter in METHODS[name].parameters}
    return {key: value for key, value in {**REQUIRED, **more}.items() if key in keys}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", ["linear", "task_arithmetic"])
def test_one_hot_weights_give_that_model(name, place, dtype):
    tunes, base = family(3, dtype=dtype)
    weights = [float(m == place) for m in range(3)]
    assert_same(run(METHODS[name], tunes, base, weight=weights), tunes[place])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCALED)
def test_scale_of_zero_gives_the_base(name, dtype):
    tunes, base = family(3, dtype=dtype)
    assert_same(
        run(METHODS[name], tunes, base, **required(name, lambda_=0.0) | {"lambda_": 0.0}), base
    )


@pytest.mark.parametrize("name", [*TRIMS, "task_arithmetic", "ties_ref", "ties_mergelm", "ties_ls"])
def test_weights_of_zero_give_the_base(name):
    tunes, base = family(3)
    assert_same(run(METHODS[name], tunes, base, **required(name) | {"weight": 0.0}), base)


@pytest.mark.parametrize("name", [*TRIMS, "ties_ref", "ties_mergelm", "ties_ls",
                                  "localize_and_stitch"])  # fmt: skip
def test_density_of_zero_gives_the_base(name):
    tunes, base = family(3)
    assert_same(run(METHODS[name], tunes, base, **required(name) | {"density": 0.0}), base)


@pytest.mark.parametrize("name", LINEAR_TRIMS)
def test_density_of_one_is_task_arithmetic(name):
    tunes, base = family(3)
    weights = {"weight": [0.3, 0.5, -0.1], "lambda_": 1.3}
    whole = run(METHODS[name], tunes, base, density=1.0, **weights)
    assert_near(whole, run(METHODS["task_arithmetic"], tunes, base, **weights), 1e-7)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", TRIMS)
def test_one_model_trimmed_to_density_one_is_the_model(name, rescale):
    tunes, base = family(1)
    assert_same(
        run(METHODS[name], tunes, base, weight=1.0, density=1.0, rescale=rescale)
        if name != "ties_row"
        else run(METHODS[name], tunes, base, weight=1.0),
        tunes[0],
    )


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", ["ties", "ties_row", "ties_ref", "ties_mergelm", "ties_ls"])
def test_ties_of_equal_models_is_one_trimmed_model(name, density):
    tunes, base = family(1)
    three = run(METHODS[name], tunes * 3, base, weight=1.0, density=density)
    one = run(METHODS[name], tunes, base, weight=1.0, density=density)
    assert_near(three, one, 1e-7)
    changed = sum(int((one[n] != base[n]).sum()) for n in base)
    assert changed > 0
    assert (changed < sum(t.numel() for t in base.values())) == (density < 1)


@pytest.mark.parametrize("name", ["multislerp", "karcher", "linear", "sce", "ram", "nuslerp",
                                  "model_stock", "localize_and_stitch"])  # fmt: skip
def test_equal_models_give_that_model(name):
    tunes, base = family(1)
    method = METHODS[name]
    count = 2 if name == "nuslerp" else 3
    used = base if method.base != "unused" else None
    same = run(
        method,
        tunes * count,
        used,
        **required(name) | ({"density": 1.0} if name == "localize_and_stitch" else {}),
    )
    expected = tunes[0]
    if name == "ram":  # what moved by less than epsilon stays
        expected = {
            n: torch.where((t - base[n]).abs() > 1e-5, t, base[n]) for n, t in expected.items()
        }
    assert_near(same, expected, 3e-7)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"passthrough", "slerp", "nearswap",
    "arcee_fusion", "nuslerp", "fisher", "regmean", "stitch", "tall_masks", "dare_linear",
    "dare_ties", "della", "della_linear"}))  # fmt: skip
def test_order_of_models_does_not_matter(name):
    """Sums of float32 are taken in the order of the models, so the last bit may differ."""
    tunes, base = family(4)
    weights = [0.4, 0.3, 0.9, 0.2]
    order = [2, 0, 3, 1]
    more = {} if "weight" not in required(name) else {"weight": weights}
    turned = {} if not more else {"weight": [weights[i] for i in order]}
    one = run(METHODS[name], tunes, base, **required(name) | more)
    other = run(METHODS[name], [tunes[i] for i in order], base, **required(name) | turned)
    assert_near(one, other, 1e-6 if name not in ("tsv", "iso_c") else 1e-5)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fisher", "regmean", "stitch"}))
def test_sources_stay_as_they_are(name):
    method = METHODS[name]
    tunes, base = family(2 if method.models[1] in (None, 2) else 1)
    before = [{n: t.clone() for n, t in m.items()} for m in (*tunes, base)]
    run(method, tunes, base, **required(name))
    for model, kept in zip((*tunes, base), before, strict=True):
        assert_same(model, kept)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fisher", "regmean", "stitch"}))
def test_nothing_moved_gives_the_base(name):
    """Every method leaves models that equal their base where they are, up to a last bit."""
    method = METHODS[name]
    base = tensors(5)
    count = 2 if method.models[1] in (None, 2) else 1
    found = run(
        method,
        [base] * count,
        base,
        **required(name) | ({"weight": 0.5} if "weight" in required(name) else {}),
    )
    assert_near(found, base, 3e-7)


def test_a_fifth_of_five_equal_experts_is_the_expert():
    tunes, base = family(1)
    assert_near(run(METHODS["task_arithmetic"], tunes * 5, base, weight=0.2), tunes[0], 3e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slerp_ends_are_the_models(dtype):
    tunes, base = family(1, dtype=dtype, size=3.0)
    assert_same(run(METHODS["slerp"], tunes, base, t=0.0), base)
    assert_same(run(METHODS["slerp"], tunes, base, t=1.0), tunes[0])


def test_model_stock_of_orthogonal_deltas_is_the_base():
    base = tensors(0)
    one = {n: t.clone() for n, t in base.items()}
    two = {n: t.clone() for n, t in base.items()}
    for name in base:
        one[name].view(-1)[::2] += 0.5
        two[name].view(-1)[1::2] += 0.5
    assert_same(run(METHODS["model_stock"], [one, two], base), base)


def test_model_stock_by_row_of_equal_models_is_the_model():
    tunes, base = family(1)
    assert_near(run(METHODS["model_stock"], tunes * 2, base, filter_wise=True), tunes[0], 3e-7)


def test_shapes_are_worth_testing():
    sizes = {len(shape) for shape in SHAPES.values()}
    assert sizes == {1, 2}
