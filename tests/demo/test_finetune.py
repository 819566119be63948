"""The example script as a user runs it: a text in, a better model out, resumed."""

import importlib.util
import re
from pathlib import Path

import pytest
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "finetune_with_cce.py"
NANO = pytest.param("nano", marks=[pytest.mark.exhaustive, pytest.mark.timeout(1500)])


@pytest.fixture(params=["tiny", NANO])
def run(request, tmp_path):
    request.getfixturevalue({"tiny": "tiny_size", "nano": "pocket_nano"}[request.param])
    text = tmp_path / "notes.txt"
    text.write_text("".join(f"{i} green bottles hanging on the wall\n" for i in range(400)))
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    app = typer.Typer()
    app.command()(script.main)

    def run(*options: str):
        paths = ("--text", str(text), "--out", str(tmp_path / "out"))
        model = ("--model", f"pocket:{request.param}")
        return CliRunner().invoke(app, [*paths, *model, *options])

    return run


def losses(stdout: str) -> tuple[float, float]:
    before, after = re.findall(r"held-out loss +\w+: ([0-9.]+)", stdout)
    return float(before), float(after)


def test_finetuning_lowers_the_loss_and_resumes(run, tmp_path):
    options = ("--steps", "27", "--batch", "2", "--context", "32", "--learning-rate", "3e-2")
    first = run(*options)
    assert first.exit_code == 0, first.exception
    before, after = losses(first.stdout)
    assert after < before / 2
    assert losses(run(*options).stdout) == (before, after)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model")


def test_too_short_a_text_is_refused(run):
    done = run("--context", "9000")
    assert isinstance(done.exception, ValueError)
    assert "text: expected at least 18000 tokens" in str(done.exception)
