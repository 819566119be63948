"""Settings of recipes: scalars, gradients, steps and filters, and what is refused."""

import random

import pytest

from gemma_ext.souping.recipes.marks import RecipeError, read_yaml
from gemma_ext.souping.recipes.values import read_setting


def setting(text):
    return read_setting(read_yaml(text, "r.yml")[0])


@pytest.mark.parametrize(
    ("text", "value"), [("0.25", 0.25), ("1e-5", 1e-5), ("true", True), ("abc", "abc"), ("3", 3)]
)
def test_a_scalar_is_the_same_everywhere(text, value):
    assert setting(text).at("any", random.random()) == value


def test_a_gradient_is_linear_between_its_numbers():
    gradient = setting("[0, 10, 30]")
    got = [gradient.at("x", depth) for depth in (0, 0.25, 0.5, 0.75, 1)]
    assert got == [0, 5, 10, 20, 30]
    assert setting("[7]").at("x", 0.6) == 7


def test_steps_hold_until_the_next():
    steps = setting("[a, b, c]")
    assert [steps.at("x", depth) for depth in (0, 0.49, 0.5, 0.99, 1)] == ["a", "a", "b", "b", "c"]
    assert setting("[true, false]").at("x", 0.9) is True


def test_the_first_filter_in_the_name_wins():
    text = """
- {filter: mlp, value: [0, 1]}
- {filter: mlp.up, value: 5}
- {filter: attn, value: 2}
"""
    assert setting(text).at("layers.0.mlp.up_proj", 0.5) == 0.5
    assert setting(text).at("layers.0.attn.q", 0.5) == 2
    assert setting(text).at("norm", 0.5) is None
    for rest in ("- {value: 9}", "- {filter: '*', value: 9}", "- {filter: null, value: 9}"):
        assert setting(text + rest).at("norm", 0.5) == 9
    assert setting("{filter: attn, value: 3}").at("attn", 0) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "line 1: expected at least one value, got an empty list"),
        ("[1, {value: 2}]", "line 1, [1]: expected a value: filters and values do not mix"),
        ("[1, [2]]", "line 1, [1]: expected a value"),
        ("- {filter: a}", "line 1, [0]: expected a value beside the filter"),
        ("- {filter: a, valeu: 1}", "line 1, [0].valeu: unknown key; did you mean value?"),
        ("- {filter: [a], value: 1}", "line 1, [0].filter: expected text, got a list"),
        (".nan", "line 1: expected a finite number, got nan"),
        ("2020-01-01", "expected a number, true, false or text"),
    ],
)
def test_what_is_no_value_is_refused(text, message):
    with pytest.raises(RecipeError) as error:
        setting(text)
    assert message in str(error.value)
    assert str(error.value).startswith("r.yml, line 1")


def test_scalars_know_their_places():
    found = setting("- {filter: a, value: [1, 2]}\n- {value: x}").scalars()
    assert [(entry.place, value) for entry, value in found] == [
        ("r.yml, line 1, [0].value[0]", 1),
        ("r.yml, line 1, [0].value[1]", 2),
        ("r.yml, line 2, [1].value", "x"),
    ]
