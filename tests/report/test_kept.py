"""Finished pieces of a study are computed once."""

import json

import pytest

from gemma_ext.report import Kept


def test_a_piece_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": 1.5, "sizes": (1, 2)}

    path = tmp_path / "out" / "results.json"
    first = Kept(path, {"steps": (1, 2)})("a", make)
    assert first == {"value": 1.5, "sizes": [1, 2]}
    again = Kept(path, {"steps": (1, 2)})
    assert again("a", make) == first
    assert made == [1]
    assert again("b", lambda: 3) == 3
    assert json.loads(path.read_text())["pieces"] == {"a": first, "b": 3}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_another_identity_starts_anew(tmp_path):
    path = tmp_path / "results.json"
    Kept(path, {"steps": 1})("a", lambda: 1)
    assert Kept(path, {"steps": 2})("a", lambda: 2) == 2
    assert Kept(path, {"steps": 2})("a", lambda: 3) == 2


def test_a_failure_leaves_what_was_there(tmp_path):
    kept = Kept(tmp_path / "results.json", 0)
    kept("a", lambda: 1)
    with pytest.raises(ZeroDivisionError):
        kept("b", lambda: 1 / 0)
    assert Kept(tmp_path / "results.json", 0).pieces == {"a": 1}
