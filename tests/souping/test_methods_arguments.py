"""What methods refuse, each in one sentence; the registry; greedy soups; what engines may skip."""

from __future__ import annotations

import pytest
import torch
from merge_oracle import assert_near, family, run

from gemma_ext.ops.souping import Part
from gemma_ext.souping.method import Method, TensorInfo, Values
from gemma_ext.souping.methods import METHODS, get, greedy_soup
from gemma_ext.souping.parameters import constant


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("linear", {"weight": [1.0, -1.0]}, r"expected weights that do not add up to 0, got \[1.0"),
        ("multislerp", {"weight": [1.0, -1.0]}, "expected weights that do not add up to 0"),
        ("fisher", {}, "expected fishers of every model: a file each, got none"),
        ("regmean", {}, "expected grams of every model: a file each, got none"),
        ("stitch", {}, "expected masks of every model: a file each, got none"),
        (
            "della",
            {"weight": 1.0, "density": 0.9},
            r"expected density - epsilon > 0 and density \+ epsilon < 1, got density 0.9 and "
            "epsilon 0.15 for ",
        ),
        (
            "della_linear",
            {"weight": 1.0, "density": 0.5, "spread": "size"},
            "expected spread to be one of rank, value, got 'size'",
        ),
        (
            "dare_linear",
            {"weight": 1.0, "rescale_norm": "l3"},
            "expected rescale_norm to be one of density, l1, l2, linf, got 'l3'",
        ),
        (
            "ties",
            {"weight": 1.0, "rescale": True, "rescale_norm": "density"},
            "expected rescale_norm to be one of l1, l2, linf, got 'density'",
        ),
        (
            "ties",
            {"weight": 1.0, "election": "vote"},
            "expected election to be one of sum, count, got 'vote'",
        ),
        (
            "ties",
            {"weight": 1.0, "zero": "left"},
            "expected zero to be one of positive, none, majority, minority, got 'left'",
        ),
        (
            "ties",
            {"weight": 1.0, "zero": "majority"},
            "expected zero to be positive or none with ties, which sees one tensor at a time, got "
            "'majority'",
        ),
        (
            "ties_ref",
            {"merge_func": "median"},
            "expected merge_func to be one of weighted_mean, mean, sum, max, got 'median'",
        ),
        ("tall_masks", {"task": 2}, "expected task to be a model below 2, got 2"),
        ("slerp", {"t": 0.5}, "slerp: expected 1 models, got 2"),
    ],
)
def test_refusals(name, parameters, message):
    tunes, base = family(2)
    with pytest.raises(ValueError, match=message):
        run(METHODS[name], tunes, base, **parameters)


def test_a_method_is_an_object():
    from gemma_ext.souping import merge_tensors

    tunes, base = family(2)
    values = constant(METHODS["ties"], 2, weight=1.0, density=0.5)
    with pytest.raises(TypeError, match=r"method: expected a Method, .*got the class Ties"):
        merge_tensors(METHODS["ties"], tunes, base, values)
    with pytest.raises(TypeError, match=r"method: expected a Method, .*got 'ties'"):
        merge_tensors("ties", tunes, base, values)


@pytest.mark.parametrize("name", ["ties_ref", "ties_ls", "localize_and_stitch"])
def test_one_threshold_has_one_density(name):
    tunes, base = family(1)
    method = METHODS[name]()
    plain = constant(method, 1, density=0.2)

    def by_name(tensor):
        values = plain(tensor)
        density = 0.5 if "norm" in tensor.name else 0.2
        return Values([{**values.models[0], "density": density}], values.merge)

    from gemma_ext.souping.engine.memory import merge_tensors

    with pytest.raises(ValueError, match=r"expected one density for the whole model with .*norm"):
        merge_tensors(method, tunes, base, by_name)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"wieght": 1.0}, "expected parameters of linear among weight, normalize, got 'wieght'"),
        ({}, "expected weight for linear, got none"),
        ({"weight": [1.0]}, "expected weight of 2 models, got 1"),
    ],
)
def test_constant_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        constant(METHODS["linear"], 2, **parameters)


def test_lambda_has_a_spelling_in_python():
    info = TensorInfo("w", (3,))
    values = constant(METHODS["magmax"], 2, lambda_=0.5, seed=7)(info)
    assert values.merge == {"lambda": 0.5}
    assert values.seed == 7
    assert constant(METHODS["magmax"], 2)(info).merge == {"lambda": 1.0}
    with pytest.raises(ValueError, match="expected parameters of arcee_fusion among none, got 't'"):
        constant(METHODS["arcee_fusion"], 1, t=1.0)


def test_methods_go_by_their_names():
    assert all(get(name) is method for name, method in METHODS.items())
    assert all(method.name == name for name, method in METHODS.items())
    with pytest.raises(
        ValueError, match="expected a known merge method, got 'tiess'; did you mean ties"
    ):
        get("tiess")
    with pytest.raises(
        ValueError, match=r"expected a known merge method, got 'zzz': arcee_fusion, "
    ):
        get("zzz")


def test_every_method_describes_itself():
    for method in METHODS.values():
        assert issubclass(method, Method)
        assert method.__doc__
        assert method.base in ("needed", "optional", "unused")
        assert method.grain in ("element", "row", "tensor")
        keys = [p.key for p in method.parameters]
        assert len(keys) == len(set(keys))
        assert method().surveys >= 0


def test_keys_and_defaults_are_mergekits():
    """Weights are required, normalize is on for linear, ties and della, rescale for DARE, DELLA."""
    normal = {"linear", "ties", "ties_row", "della"}
    rescaled = {"dare_linear", "dare_ties", "della", "della_linear"}
    for name in ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della",
                 "della_linear", "breadcrumbs", "breadcrumbs_ties"):  # fmt: skip
        defaults = {p.key: p.default for p in METHODS[name].parameters}
        assert isinstance(defaults["weight"], type)
        assert defaults["normalize"] == (name in normal)
        assert defaults.get("rescale", False) == (name in rescaled)
        assert name == "linear" or {"lambda", "int8_mask"} <= set(defaults)
    assert {p.key: p.default for p in METHODS["breadcrumbs"].parameters}["gamma"] == 0.01
    assert {p.key: p.default for p in METHODS["della"].parameters}["epsilon"] == 0.15
    assert {p.key for p in METHODS["karcher"].parameters} == {"max_iter", "tol"}
    assert {p.key for p in METHODS["nuslerp"].parameters} == {
        "weight", "nuslerp_flatten", "nuslerp_row_wise"}  # fmt: skip


# Greedy soups.


def test_greedy_soup_keeps_what_helps():
    """Scores: how near the soup comes to a goal that models 1 and 3 average to."""
    points, goal = [0.0, 4.0, 9.0, 2.0], 3.0
    asked = []

    def score(weights):
        asked.append(list(weights))
        return -abs(sum(w * p for w, p in zip(weights, points, strict=True)) - goal)

    assert greedy_soup(score, 4) == [0.0, 0.5, 0.0, 0.5]
    assert len(asked) == 4 + 3
    assert asked[:4] == [[float(i == j) for i in range(4)] for j in range(4)]


@pytest.mark.parametrize(("accept_equal", "expected"), [(False, [1.0, 0.0]), (True, [0.5, 0.5])])
def test_greedy_soup_and_equal_scores(accept_equal, expected):
    assert greedy_soup(lambda weights: 1.0, 2, accept_equal=accept_equal) == expected


def test_greedy_soup_of_real_tensors():
    tunes, _ = family(3, shapes={"w": (50,)})
    goal = (tunes[0]["w"] + tunes[2]["w"]) / 2

    def score(weights):
        return -float((run(METHODS["linear"], tunes, weight=list(weights))["w"] - goal).norm())

    weights = greedy_soup(score, 3)
    assert weights == [0.5, 0.0, 0.5]
    assert_near(run(METHODS["linear"], tunes, weight=weights), {"w": goal}, 1e-6)
    with pytest.raises(ValueError, match="expected at least one model, got 0"):
        greedy_soup(score, 0)
    with pytest.raises(TypeError, match="expected models to be their number, got list"):
        greedy_soup(score, [])


# What engines may leave out.

SKIPPING = [
    ("ties", {"density": 1.0}, [True, True, True]),
    ("ties", {"density": 0.5}, [False, True, True]),
    ("ties", {"density": 0.5, "rescale": True}, [False, True, False]),
    ("dare_linear", {"density": 0.5}, [True]),
    ("dare_linear", {"density": 0.5, "rescale_norm": "l1"}, [False]),
    ("dare_linear", {"density": 1.0, "rescale_norm": "l1"}, [True]),
    ("della", {"density": 0.5}, [True]),
    ("breadcrumbs", {"density": 1.0}, [True, True, True]),
    ("sce", {"select_topk": 1.0}, [True, True, False]),
    ("sce", {"select_topk": 0.5}, [False, False, False]),
    ("ties_ref", {}, [False, False, False]),
    ("ties_ref", {"zero": "positive"}, [False, False, True]),
    ("model_stock", {"filter_wise": True}, [True]),
    ("nuslerp", {"nuslerp_flatten": False}, [True]),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, [False]),
    ("task_arithmetic", {}, []),
]


@pytest.mark.parametrize(("name", "parameters", "skipped"), SKIPPING)
def test_steps_that_teach_nothing_are_skipped_and_may_be(name, parameters, skipped):
    """Whether an engine calls a step that is skipped or not, the result is the same."""
    tunes, base = family(2, shapes={"w": (6, 7)})
    keys = {p.key for p in METHODS[name].parameters}
    weight = {"weight": 0.7} if "weight" in keys else {}
    whole = run(METHODS[name], tunes, base, **weight, **parameters)["w"]
    method = METHODS[name]()
    info = TensorInfo("w", (6, 7))
    state = method.begin(info, constant(method, 2, **weight, **parameters)(info))
    out = torch.empty(6, 7)
    found = []
    for step in range(method.surveys):
        found.append(method.skips(step, state))
        if not found[-1]:
            method.survey(step, Part([t["w"] for t in tunes], base["w"], None, "w"), state)
            method.settle(step, state)
        if method.model_wide:
            method.settle_model(step, {"w": state})
    method.merge(Part([t["w"] for t in tunes], base["w"], out, "w"), state)
    assert found == skipped
    assert torch.equal(out, whole)
