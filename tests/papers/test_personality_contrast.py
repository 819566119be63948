"""Pairs of answers: the table, the author, the lengths."""

import csv

import personality_toy as toy
import pytest

from gemma_ext.lm import ScriptedModel
from gemma_ext.papers import personality as p
from gemma_ext.papers.personality.contrast import COLUMNS


def test_a_table_is_read_as_it_was_written(tmp_path):
    pairs = [
        *toy.pairs(),
        p.Pair('a, "b"\nc?', "x", "openness", "openness", "é, yes", "closedness", "no"),
    ]
    p.write_pairs(tmp_path / "pairs.csv", pairs)
    assert p.read_pairs(tmp_path / "pairs.csv") == pairs
    assert list(tmp_path.iterdir()) == [tmp_path / "pairs.csv"]


def test_tables_that_cannot_be_read(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("question,answer\nx,y\n")
    with pytest.raises(ValueError, match=r"expected the columns question, .*lacks \['edit_topic'"):
        p.read_pairs(path)
    with path.open("w", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerows([COLUMNS, ["q", "t", "d", "h", "yes", "l", "no"], [*"qtdhYl", ""]])
    with pytest.raises(ValueError, match=r"line 3: expected two answers, got an empty"):
        p.read_pairs(path)


ROWS = [
    {
        "Question": f"What of {trait}?",
        "Edit Topic": "rain",
        "Answer": "As released.",
        "Target Personality": trait.title(),
    }
    for trait in p.TRAITS
]


def author(prompt):
    ((role, text),) = prompt
    assert role == "user"
    assert "{" not in text
    return f" {text.partition(' of ')[2].partition('.')[0]}! "


@pytest.mark.parametrize("both", [True, False])
def test_one_author_writes_both_sides_unless_told_otherwise(both):
    lm = ScriptedModel(author)
    found = p.from_answers(ROWS, lm, both=both)
    assert [pair.trait_dimension for pair in found] == list(p.TRAITS)
    for pair in found:
        kind = pair.trait_dimension
        assert pair.low_trait_response == f"{p.OPPOSITES[kind]}!"
        assert pair.high_trait_response == (f"{kind}!" if both else "As released.")
        assert (pair.high_trait_label, pair.low_trait_label) == (kind, p.OPPOSITES[kind])
    assert len(lm.asked) == len(ROWS) * (1 + both)


def test_pairs_with_an_empty_side_are_left_out():
    silent = ScriptedModel(lambda prompt: " " if "introversion" in prompt[0][1] else "Yes.")
    assert [pair.trait_dimension for pair in p.from_answers(ROWS, silent)] == list(p.TRAITS[1:])


def test_an_unknown_personality_is_refused():
    with pytest.raises(ValueError, match=r"Target Personality: expected one of .*, got 'grit'"):
        p.from_answers([{**ROWS[0], "Target Personality": "grit"}], ScriptedModel(author))


def test_pairs_of_like_length_are_kept():
    short, long = toy.pairs()[3], toy.pairs()[0]
    odd = p.Pair(*list(vars(short).values())[:4], "one two three four", "low", "one two")
    assert p.length_matched([short, odd, long]) == [short, long]
    assert p.length_matched([short, odd, long], 2.0) == [short, odd, long]
    with pytest.raises(ValueError, match=r"ratio: expected at least 1, got 0\.5"):
        p.length_matched([], 0.5)
