"""What `gemma-ext` lists, and how a command ends that cannot do its work."""

import re

import pytest

from gemma_ext import cli
from gemma_ext.command_line import one_sentence


def called(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["gemma-ext", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_commands_are_listed_by_name(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")  # a line each
    assert called(monkeypatch, "--help") == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = [line.strip(" │|").split() for line in shown.splitlines()]
    listed = [words[0] for words in lines if words and words[0] in cli.COMMANDS]
    assert listed == sorted(cli.COMMANDS)


def test_what_a_command_misses_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("gemma_ext.extras.find_spec", lambda name: None)
    assert called(monkeypatch, "demo", "--out", str(tmp_path)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("gemma-ext demo: the demo needs transformers, ")
    assert printed.err.endswith("pip install 'gemma_ext[demo]'\n")


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError, ImportError])
def test_errors_of_the_input(error, capsys):
    with pytest.raises(SystemExit) as end, one_sentence("sae train"):
        raise error("k: expected at least 1, got 0")
    assert end.value.code == 1
    assert capsys.readouterr().err == "gemma-ext sae train: k: expected at least 1, got 0\n"


def test_an_interruption_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as end, one_sentence("merge"):
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_what_is_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_sentence("merge"):
        raise ZeroDivisionError
