"""`gemma-ext recursive` as it is typed."""

import json
import shutil

import pytest
import torch
from recursive_models import assert_same_model, logits, tokens
from tiny_gemma import base
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gemma_ext.nn.recursive import Plan, files, load
from gemma_ext.papers.recursive import Recipe, convert
from gemma_ext.papers.recursive.command import app

TEXT = "def loop(x):\n    return x + 1  # a comment about nothing\n\n" * 60


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def source(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return base(tmp_path / "source", [TEXT])


def test_convert_and_export(source, tmp_path):
    out = tmp_path / "out"
    options = ("--rank", 3, "--rank-of", "q_proj=5", "--init", "lower", "-q")
    made = run("convert", source, out, *options)
    assert made.exit_code == 0, made.output
    assert made.stdout.strip() == str(out)
    recipe = Recipe(2, "lower", rank=3, ranks={"q_proj": 5})
    vanilla = AutoModelForCausalLM.from_pretrained(source)
    assert_same_model(load(out), convert(vanilla, recipe), tokens())
    assert (out / "tokenizer.json").exists()
    assert run("export", out, tmp_path / "v", "-q").exit_code == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "v", attn_implementation="eager")
    torch.testing.assert_close(
        logits(plain, tokens()), logits(load(out), tokens()), atol=1e-5, rtol=0
    )


def test_train_with_a_teacher_then_for_exits(source, tmp_path):
    out, up, exits = (tmp_path / name for name in ("out", "up", "exits"))
    run("convert", source, out, "--rank", 3, "-q")
    common = ("--text", tmp_path / "text.txt", "--sequence", 16, "--batch", 2, "-q")
    made = run(
        "train", out, up, *common, "--teacher", source, "--held-out", tmp_path / "text.txt",
        "--steps", 3, "--rate", 0.01, "--save-every", 2,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "held-out loss" in made.stdout
    assert not torch.equal(logits(load(up), tokens()), logits(load(out), tokens()))
    assert (up / "tokenizer.json").exists()
    assert (up / "checkpoints" / "checkpoint-2" / "model.safetensors").exists()
    made = run(
        "train", up, exits, *common, "--steps", 2, "--exits", "aggressive", "--self-distillation"
    )
    assert made.exit_code == 0, made.output
    assert Plan.of_model(load(exits)).loops == 2
    again = run("train", up, exits, *common, "--steps", 2)
    assert "out: expected a folder without a model" in str(again.exception)


def test_an_interrupted_training_goes_on(source, tmp_path):
    run("convert", source, tmp_path / "out", "-q")
    common = (
        "--text", tmp_path / "text.txt", "--sequence", 16, "--batch", 2, "-q", "--save-every", 2,
        "--rate", 0.01,
    )  # fmt: skip
    assert run("train", tmp_path / "out", tmp_path / "a", *common, "--steps", 4).exit_code == 0
    part = tmp_path / "b"
    part.mkdir()
    # as an interruption after the second step leaves it
    (tmp_path / "a" / "checkpoints").rename(part / "checkpoints")
    shutil.rmtree(part / "checkpoints" / "checkpoint-4")
    assert run("train", tmp_path / "out", part, *common, "--steps", 4).exit_code == 0
    for one, two in zip(load(part).parameters(), load(tmp_path / "a").parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loops", 3), "loops: expected a divisor of the 2 shared layers of 2, got 3"),
        (("--init", "best"), "init: expected one of"),
        (("--rank-of", "q_proj"), "rank-of: expected LINEAR=RANK, got 'q_proj'"),
        (("--dtype", "int8"), "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_one_sentence_for_what_is_amiss(source, tmp_path, options, message):
    made = run("convert", source, tmp_path / "out", "-q", *options)
    assert isinstance(made.exception, SystemExit)
    assert f"gemma-ext recursive convert: {message}" in str(made.exception)
    assert not (tmp_path / "out").exists()


def test_training_of_no_model_is_refused_by_name(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    made = run("train", tmp_path / "none", tmp_path / "out", "--text", tmp_path / "text.txt")
    assert "train: source: expected a model's folder with config.json" in str(made.exception)
    assert not (tmp_path / "out").exists()


def test_training_needs_no_token_that_pads(source, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(source)
    assert AutoTokenizer.from_pretrained(source).pad_token_id is None
    run("convert", source, tmp_path / "out", "-q")
    record = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    path = tmp_path / "out" / "generation_config.json"
    path.write_text(json.dumps(record | {"eos_token_id": [1, 5]}))
    made = run(
        "train", tmp_path / "out", tmp_path / "up", "--text", tmp_path / "text.txt",
        "--sequence", 16, "--batch", 2, "--steps", 2, "-q",
    )  # fmt: skip
    assert made.exit_code == 0, made.exception
    assert load(tmp_path / "up").generation_config.eos_token_id == [1, 5]
    assert AutoTokenizer.from_pretrained(tmp_path / "up").pad_token_id is None


def test_an_interrupted_save_of_a_training_goes_on(source, tmp_path, monkeypatch):
    run("convert", source, tmp_path / "out", "-q")
    words = (
        "train", tmp_path / "out", tmp_path / "up", "--text", tmp_path / "text.txt",
        "--sequence", 16, "--batch", 2, "--steps", 2, "--save-every", 2, "-q",
    )  # fmt: skip
    plain = files.write_tensors

    def stops(path, tensors):
        if "checkpoints" not in path.parts:
            raise OSError("disk full")
        plain(path, tensors)

    monkeypatch.setattr(files, "write_tensors", stops)
    assert "gemma-ext recursive train: disk full" in str(run(*words).exception)
    monkeypatch.setattr(files, "write_tensors", plain)
    made = run(*words)
    assert made.exit_code == 0, made.exception
    assert load(tmp_path / "up").config.recursive["loops"] == 2
