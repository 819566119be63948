"""python_examples/merge_two_models.py as a user runs it."""

import importlib.util
import re
from pathlib import Path

import pytest
import typer
from recipe_models import generates, save_models
from typer.testing import CliRunner

SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "merge_two_models.py"


def run(*options):
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    app = typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, [str(option) for option in options])


def scores(stdout):
    rows = re.findall(r"^(base|one|other|soup|ties) +([0-9.]+) +([0-9.]+)$", stdout, re.MULTILINE)
    return {name: (float(a), float(b)) for name, a, b in rows}


def test_models_and_texts_of_ones_own(tmp_path):
    words = {name: ["soup", "stone"] for name in ("base", "one", "other")}
    save_models(tmp_path, *words, words=words, max_position_embeddings=256)
    text = tmp_path / "text.txt"
    text.write_text("soup stone soup " * 80)
    options = (
        *("--model", tmp_path / "one", "--other", tmp_path / "other", "--base", tmp_path / "base"),
        *("--text", text, "--other-text", text, "--out", tmp_path / "out"),
    )
    done = run(*options)
    assert done.exit_code == 0, done.output
    found = scores(done.stdout)
    assert list(found) == ["base", "one", "other", "soup", "ties"]
    assert len(set(found.values())) == 5
    assert (tmp_path / "out" / "explain.html").is_file()
    for name in ("soup", "ties"):
        assert generates(tmp_path / "out" / name)
    assert scores(run(*options).stdout) == found


def test_what_is_missing_is_said(tmp_path):
    done = run("--model", tmp_path, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "--other, --base, --text" in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.slow
def test_the_pocket(tiny_size, tmp_path):
    done = run("--model", f"pocket:{tiny_size}", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = scores(done.stdout)
    assert found["one"][0] < found["base"][0]
    assert found["other"][1] < found["base"][1]
