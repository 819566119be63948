"""`gemma-ext merge` as a command: flags of mergekit-yaml, messages and exit codes."""

import json

import pytest
import typer
from recipe_models import save_models, weights
from typer.testing import CliRunner

from gemma_ext.souping.recipes import command

LINEAR = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_models(tmp_path, "a", "b", words={"a": ["soup"], "b": ["soup"]})
    (tmp_path / "r.yml").write_text(LINEAR)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_merge_prints_its_folder_and_shows_a_bar(folder):
    done = run("r.yml", "out")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(folder / "out") or done.stdout.strip() == "out"
    assert "linear" in done.stderr
    a, b, got = (weights(folder / name)["model.norm.weight"] for name in ("a", "b", "out"))
    assert ((a + b) / 2 - got).abs().max() <= (a + b).abs().max() * 2.0**-9
    assert (folder / "out" / "tokenizer.json").is_file()


def test_flags_that_change_the_output(folder):
    done = run(
        *("r.yml", "out", "--no-copy-tokenizer", "--no-write-model-card", "--out-shard-size", "4K"),
        *("-j", 2, "--random-seed", 3, "-q", "--lora-merge-dtype", "float32", "--device", "auto"),
    )
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    names = {path.name for path in (folder / "out").iterdir()}
    assert not names & {"tokenizer.json", "README.md", "mergekit_config.yml"}
    assert "model.safetensors.index.json" in names


def test_flags_without_a_use_are_accepted_with_a_reason(folder):
    flags = [
        *("--low-cpu-memory", "--read-to-gpu", "--multi-gpu", "--gpu-rich", "--lazy-unpickle"),
        *("--clone-tensors", "--safe-serialization", "--async-write", "--write-threads", 3),
        *("--lora-merge-cache", "x"),
    ]
    done = run("r.yml", "out", *flags)
    assert done.exit_code == 0, done.output
    for flag in (flag for flag in flags if str(flag).startswith("--")):
        assert f"{flag} has no effect: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r.yml"], "expected OUT, the folder of the output, or --lint or --explain"),
        (["r.yml", "out", "--no-safe-serialization"], "the output is always safetensors"),
        (["r.yml", "out", "--out-shard-size", "many"], "expected a size as 5B or 500M, got many"),
        (["r.yml", "out", "--lora-merge-dtype", "int8"], "expected float32, bfloat16, float16"),
        (["r.yml", "out", "--device", "abacus"], "expected cpu, cuda or auto, got abacus"),
    ],
)
def test_arguments_that_are_refused(folder, arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    words = " ".join(done.stderr.replace("│", " ").split())
    assert message in words


def test_a_device_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = run("r.yml", "out", "--cuda")
    assert done.exit_code == 2
    assert "torch sees no such device" in done.stderr


def test_errors_are_one_sentence(folder):
    (folder / "r.yml").write_text(LINEAR.replace("weight", "wieght"))
    done = run("r.yml", "out")
    assert done.exit_code == 1
    assert done.stderr.strip() == (
        "gemma-ext merge: r.yml, line 2, parameters.wieght: linear has no parameter wieght; "
        "did you mean weight?"
    )
    missing = run("missing.yml", "out")
    assert missing.exit_code == 1
    assert "missing.yml: expected a recipe, got no file" in missing.output
    assert isinstance(run("r.yml", "out", "-v").exception, ValueError)
    assert not (folder / "out").exists()


def test_an_interruption_says_how_to_go_on(folder, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_recipes", interrupt)
    done = run("r.yml", "out")
    assert done.exit_code == 130
    assert "the same command goes on from what was saved" in done.stderr


def test_lint_and_explain_need_no_output(folder):
    done = run("r.yml", "--lint", "--explain", "page.html")
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == ["nothing", "odd", "page.html"]
    (folder / "r.yml").write_text(LINEAR + "tokenizer_source: base\n".replace("base", "union"))
    (folder / "r.yml").write_text(LINEAR.replace("{weight: 1}", "{weight: 1, int8_mask: true}"))
    assert "has no effect: no mask is ever stored" in run("r.yml", "--lint").stdout
    assert not (folder / "out").exists()


def test_several_recipes(folder):
    both = "name: one\n" + LINEAR + "---\n" + LINEAR.replace("model: a", "model: one")
    (folder / "r.yml").write_text(both)
    done = run("r.yml", "out", "--intermediate-dir", "parts", "-q")
    assert done.exit_code == 0, done.output
    assert json.loads((folder / "parts" / "one" / "config.json").read_text())
    done = run("r.yml", "--lint")
    assert done.exit_code == 1
    assert "look at one recipe, got a file with several" in done.stderr


def test_sizes():
    sizes = {"5B": 5e9, "2GB": 2e9, "500M": 5e8, "1.5k": 1500, "7": 7, "1T": 1e12}
    assert {text: command._bytes(text) for text in sizes} == sizes
