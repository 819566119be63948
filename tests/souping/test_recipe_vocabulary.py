"""Which rows of which model become the rows of the output."""

import pytest
import torch

from gemma_ext.souping.recipes.marks import RecipeError
from gemma_ext.souping.recipes.recipe import parse_recipe
from gemma_ext.souping.recipes.references import parse_reference
from gemma_ext.souping.recipes.vocabulary import map_rows

MODELS = [parse_reference(name) for name in "abc"]
A = {"x": 0, "y": 1, "only_a": 2, "a_and_c": 3}
B = {"y": 0, "x": 1, "only_b": 2}
C = {"x": 5, "a_and_c": 0, "far": 9}
OUT = {"x": 0, "y": 1, "only_a": 2, "a_and_c": 3, "only_b": 4, "far": 5}


def rules(text):
    text = f"merge_method: m\nmodels: [{{model: a}}]\ntokenizer: {{tokens: {{{text}}}}}"
    return parse_recipe(text, "r.yml").tokenizer.tokens


def maps(out=OUT, base=0, stored=(4, 3, 6), **options):
    return map_rows(out, MODELS, [A, B, C], stored, base=base, **options)


def sources(mapped):
    """Each row as the set of (model, row) that it is the mean of."""
    return [
        {(int(o), int(r)) for o, r in zip(owners, rows, strict=True) if o >= 0}
        for owners, rows in zip(mapped.owners, mapped.rows, strict=True)
    ]


def test_own_row_then_base_then_only_owner_then_mean():
    a, b, c = maps(base=0)
    only_b = {(1, 2)}
    assert sources(a) == [{(0, 0)}, {(0, 1)}, {(0, 2)}, {(0, 3)}, only_b]
    assert sources(b) == [{(1, 1)}, {(1, 0)}, {(0, 2)}, {(0, 3)}, only_b]
    assert sources(c) == [{(2, 5)}, {(0, 1)}, {(0, 2)}, {(2, 0)}, only_b]
    a, b, c = maps(base=None)
    assert sources(b)[3] == {(0, 3), (2, 0)}
    assert sources(c)[1] == {(0, 1), (1, 0)}
    assert sources(b)[2] == {(0, 2)}


def test_tokens_without_a_row_at_the_end_have_none_and_elsewhere_the_mean():
    assert all(len(mapped.rows) == 5 for mapped in maps())  # "far" is beyond the rows of c
    out = {"nowhere": 0, "x": 1, "far": 4}
    a, *_ = maps(out)
    assert a.mean.tolist() == [True, False]
    assert not maps()[0].mean.any()


def test_padding_rows_are_means():
    a, b, c = maps(pad=4)
    for mapped in (a, b, c):
        assert len(mapped.rows) == 8
        assert mapped.mean.tolist() == [False] * 5 + [True] * 3
        assert sources(mapped)[5:] == [set()] * 3
    assert len(maps(pad=5)[0].rows) == 5


def test_rules():
    out = {**OUT, "new": 6}
    found = maps(
        out,
        rules=rules(
            "y: {source: b}, x: {source: b, force: true}, only_a: {source: {kind: zero}},"
            " new: {source: {kind: model_token, model: c, token: a_and_c}},"
            " a_and_c: {source: {kind: model_token, model: c, token_id: 4}, force: true}"
        ),
    )
    a, b, c = (sources(mapped) for mapped in found)
    assert [rows[0] for rows in (a, b, c)] == [{(1, 1)}] * 3
    assert [rows[1] for rows in (a, b, c)] == [{(0, 1)}, {(1, 0)}, {(1, 0)}]
    assert [rows[2] for rows in (a, b, c)] == [{(0, 2)}, set(), set()]
    assert [rows[3] for rows in (a, b, c)] == [{(2, 4)}] * 3
    assert [rows[6] for rows in (a, b, c)] == [{(2, 0)}] * 3
    assert not any(mapped.mean[2] for mapped in found)  # zeros, not means
    assert found[0].mean[5]  # "far" has no row anywhere


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: {source: d}", "tokenizer.tokens.x.source: d is none of the models of this merge"),
        ("y: {source: c}", "tokenizer.tokens.y.source: c has no row for 'y'"),
        ("x: {source: {kind: model_token, model: b, token_id: 3}}", "b has no row for 3"),
    ],
)
def test_rules_that_cannot_be(text, message):
    with pytest.raises(RecipeError) as error:
        maps(rules=rules(text))
    assert message in str(error.value)
    assert str(error.value).startswith("r.yml, line 3")


def test_identity_is_seen():
    a, b, _ = maps({"x": 0, "y": 1, "only_a": 2, "a_and_c": 3})
    assert a.is_identity(0, 4)
    assert not a.is_identity(0, 5)
    assert not b.is_identity(1, 4)
    assert not maps({"x": 0, "y": 1, "only_a": 2, "a_and_c": 3}, pad=5)[0].is_identity(0, 5)


def test_against_a_loop_token_by_token():
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    words = [f"w{i}" for i in range(60)]

    def some():
        chosen = torch.randperm(60, generator=generator)[: int(torch.randint(5, 60, ()))]
        return {words[int(i)]: n for n, i in enumerate(chosen)}

    vocabularies = [some() for _ in range(3)]
    tokens = dict.fromkeys(token for vocabulary in vocabularies for token in vocabulary)
    out = {token: index for index, token in enumerate(tokens)}
    for base in (None, 1):
        stored = [len(vocabulary) for vocabulary in vocabularies]
        found = map_rows(out, MODELS, vocabularies, stored, base=base)
        for model, mapped in enumerate(found):
            for token, got in zip(out, sources(mapped), strict=True):
                owners = [m for m in range(3) if token in vocabularies[m]]
                if model in owners:
                    owners = [model]
                elif base in owners:
                    owners = [base]
                assert got == {(m, vocabularies[m][token]) for m in owners}
