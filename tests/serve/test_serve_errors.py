"""What `gemma-ext serve` says of options that do not fit: one sentence, no traceback."""

import pytest
import torch
import transformers
import typer
from live_server import TEMPLATE
from safetensors.torch import save_file
from typer.testing import CliRunner

from gemma_ext.serve import command
from gemma_ext.serve.http import server

GATE = ["--exit", "gate", "--exit-threshold", "0.5", "--exit-weights"]


@pytest.fixture
def told(pocket_nano, monkeypatch, tmp_path):
    """What the command says of options of the nano pocket; "runs" where it would serve."""
    monkeypatch.setattr(server.Server, "run", lambda self: typer.echo("runs"))
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(command.main)

    def run(*options, model="pocket:nano"):
        result = CliRunner().invoke(app, [model, *options])
        assert isinstance(result.exception, (SystemExit, type(None))), result.exception
        (line,) = result.output.splitlines()
        return line.removeprefix("gemma-ext serve: ")

    return run


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--device cuda:x", "--device: expected cpu, cuda, cuda:1 or auto, got 'cuda:x'"),
        ("--device meta", "--device: expected cpu, cuda, cuda:1 or auto, got 'meta'"),
        ("--device cuda:99", "--device: expected one of the {cards} cards that are there, got"),
        ("--dtype int8", "--dtype: expected auto, float64, float32, bfloat16, float16, got 'int8'"),
        ("--log-level loud", "--log-level: expected one of critical, error, warning, info, debug"),
        ("--exit guess", "--exit: expected one of none, max_prob, margin, entropy, kl, argmax"),
        ("--exit max_prob", "--exit-threshold: expected a number with exit test max_prob, got"),
        ("--exit max_prob --exit-threshold nan", "--exit-threshold: expected a finite number, got"),
        ("--exit gate", "--exit-weights: expected a weight with exit test gate, got none"),
        ("--exit-decay 1", "--exit-decay: expected exit test max_prob, margin, cosine, gate with"),
        ("--exit-adapt 2", "--exit-adapt: expected a share in [0, 1), got 2.0"),
        ("--max-model-len 9999", "--max-model-len: expected at most the 512 positions of the mode"),
        ("--kv-memory 2", "--kv-memory: expected a share in (0, 1), got 2.0"),
        ("--pages 1000000000000", "--pages: expected pages that fit into the "),
        ("--width 3000000000", "--requests: expected hidden states that fit into the "),
        ("--tensor-parallel 3", "--tensor-parallel: expected a divisor of the 4 heads, got 3"),
        ("--request-timeout nan", "--request-timeout: expected more than 0, got nan"),
        ("--drain inf", "--drain: expected a finite number, got inf"),
        ("--api-key=", "--api-key: expected keys that are not empty"),
        ("--trace no/f", "--trace: expected a file that can be written, got no/f: No such file or"),
        ("--chat-template no", "--chat-template: expected a text file, got no: No such file or di"),
        ("--drafts 99", "--drafts: expected at most the backlog of 64, got 99"),
    ],
)
def test_options(told, options, sentence):
    cards = torch.cuda.device_count()
    assert told(*options.split()).startswith(sentence.replace("{cards}", str(cards)))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}", "that fails: TemplateSyntaxError: Unexpected end of template."),
        ("{{ messages | nothing }}", "that fails: TemplateAssertionError: No filter named 'nothi"),
        ("{{ told(messages) }}", "that fails: UndefinedError: 'told' is undefined"),
        ("{{ messages + 1 }}", "that fails: TypeError: "),
        ("", "that says nothing"),
        ("{# told #}\n", "that says nothing"),
    ],
)
def test_templates(told, template, why, tmp_path):
    (tmp_path / "chat.jinja").write_text(template)
    sentence = f"--chat-template: expected a Jinja template of a conversation, got one {why}"
    assert told("--chat-template", "chat.jinja").startswith(sentence)


def test_templates_that_are_in_order(told, tmp_path):
    refusing = "{% if messages[0].role != 'system' %}{{ raise_exception('who') }}{% endif %}"
    for template in (TEMPLATE, refusing, "{{ messages }}"):
        (tmp_path / "chat.jinja").write_text(template)
        assert told("--chat-template", "chat.jinja") == "runs"
    (tmp_path / "chat.jinja").write_bytes(b"\xff\xfe")
    sentence = "--chat-template: expected a text file, got chat.jinja: no UTF-8"
    assert told("--chat-template", "chat.jinja") == sentence


def test_exit_weights(told, tmp_path):
    path = tmp_path / "gate.safetensors"
    path.write_bytes(b"no tensors")
    for name, why in ((path.name, "Error while"), ("no", "No such file"), (".", "")):
        wanted = f"--exit-weights: expected a safetensors file, got {name}: {why}"
        assert told(*GATE, name).startswith(wanted)
    for tensors, why in (
        ({"weight": torch.zeros(7)}, "expected [128] with exit test gate, got [7]"),
        ({"weight": torch.zeros(128), "bias": torch.zeros(2)}, "expected one number a score"),
        ({"bias": torch.zeros(1)}, "expected weight and bias in gate.safetensors, got ['bias']"),
    ):
        save_file(tensors, path)
        assert told(*GATE, path.name).startswith(f"--exit-weights: {why}")
    save_file({"weight": torch.zeros(128)}, path)
    assert told(*GATE, path.name) == "runs"
    wanted = "--exit-weights: expected no weight with exit test none, got one"
    assert told("--exit-weights", path.name) == wanted


def test_models(told, tmp_path, monkeypatch):
    wanted = "model: expected pocket, a folder or the id of a hub, got"
    assert told(model="./no") == f"{wanted} './no'"
    assert told(model="no:pe").startswith(f"{wanted} 'no:pe': Repo id must use alphanumeric chars")
    assert told(model="pocket:huge").startswith("model: expected pocket:nano or pocket:small, got")
    (tmp_path / "empty").mkdir()
    assert told(model="empty") == "model: expected a folder with a config.json, got 'empty'"

    def unreachable(name):
        raise OSError("We couldn't connect.\nCheck your internet connection.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    assert told(model="nope") == f"{wanted} 'nope': We couldn't connect."


def test_folders_whose_files_are_broken(told, pocket_nano, tmp_path):
    folder = tmp_path / "broken"
    pocket_nano.model.save_pretrained(folder)
    pocket_nano.tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    wanted = "model: expected pocket, a folder or the id of a hub, got 'broken': "
    assert told(model="broken").startswith(f"{wanted}Error while deserializing header")
    (folder / "model.safetensors").unlink()
    assert told(model="broken").startswith(f"{wanted}Error no file named")
    (folder / "config.json").write_text("{")
    assert told(model="broken").startswith(wanted)
