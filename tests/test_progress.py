"""Bars on stderr, and what is said where a package is missing."""

import sys

import pytest

from gemma_ext.extras import require
from gemma_ext.progress import byte_bar, progress_bar, track


def test_a_missing_package_is_named_with_its_remedy():
    remedy = r"^scoring needs no_such, nor_this: pip install 'gemma_ext\[lm\]'$"
    with pytest.raises(ImportError, match=remedy):
        require("scoring", "lm", "math", "no_such", "nor_this")
    require("scoring", "lm", "math")


def test_bar_counts_and_notes(capfd):
    with progress_bar("scoring", 3) as advance:
        advance(1)
        advance(2, "loss 1.25")
    written = capfd.readouterr().err
    assert "scoring" in written
    assert "3/3" in written
    assert "loss 1.25" in written


def test_bar_shows_bytes(capfd):
    with byte_bar("merging") as moved:
        moved(500_000, 2_000_000)
        moved(2_000_000, 2_000_000)
    written = capfd.readouterr().err
    assert "merging" in written
    assert "2.0/2.0 MB" in written


def test_items_are_tracked_with_and_without_a_length(capfd):
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    assert list(track(iter("de"), "more")) == ["d", "e"]
    written = capfd.readouterr().err
    assert "letters" in written
    assert "3/3" in written
    assert "2/?" in written


def test_nothing_is_drawn_or_needed_unless_asked_for(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "rich", None)
    with progress_bar("scoring", 3, False) as advance, byte_bar("merging", False) as moved:
        advance(1, "note")
        moved(1, 2)
    assert list(track([1, 2], "items", False)) == [1, 2]
    assert capfd.readouterr().err == ""
    remedy = r"^the progress bar needs rich: pip install 'gemma_ext\[demo\]'$"
    for bar in (progress_bar("scoring", 3), byte_bar("merging")):
        with pytest.raises(ImportError, match=remedy):
            bar.__enter__()
