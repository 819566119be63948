"""Options of `gemma-ext serve`, and what it says; the server itself is not started."""

import pytest
import typer
from typer.testing import CliRunner

from gemma_ext.serve import command, launch, replicas
from gemma_ext.serve.http import server


@pytest.fixture
def started(monkeypatch):
    """What the command starts: a launch, a place, and how."""
    told = []

    class Server:
        def __init__(self, app, host, port, log_level):
            told.append((app, host, port, log_level))

        def run(self):
            told.append("run")

    monkeypatch.setattr(launch.Launch, "app", lambda self: self)
    monkeypatch.setattr(server, "Server", Server)
    monkeypatch.setattr(
        replicas, "serve_replicas", lambda launch, count, **more: told.append((launch, count, more))
    )
    return told


def run(*arguments, **options):
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, arguments, **options)


def test_defaults(started):
    assert run().exit_code == 0
    (made, host, port, level), ran = started
    assert (made.model, host, port, level, ran) == ("pocket", "127.0.0.1", 8000, "info", "run")
    assert made.settings.api_keys == ()
    exits = {"name": "none", "threshold": None, "strict": None, "decay": 0.0, "adapt": 0.0}
    assert made.exits == exits


def test_every_option_has_its_place(started, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    options = {
        "host": "::1", "port": 9, "name": "n", "device": "cuda:1", "dtype": "bfloat16",
        "threads": 3, "width": 4, "requests": 5, "max-model-len": 6, "pages": 7,
        "kv-memory": 0.25, "kv-policy": "copy", "keep": 2, "kv-pressure": "none", "backlog": 3,
        "order": "deepest", "mode": "csb",
        "min-coda-batch": 8, "drafts": 2, "routing": "host", "prefill-tokens": 9, "exit": "margin",
        "exit-threshold": 0.5,
        "exit-weights": "gate.safetensors", "exit-decay": 4.0, "exit-adapt": 0.4,
        "trace": "steps.jsonl",
        "max-open": 10, "max-tokens": 11, "max-body": 12,
        "request-timeout": 13, "drain": 14, "chat-template": template, "tensor-parallel": 2,
        "log-level": "error",
    }  # fmt: skip
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    given += [
        "--exit-strict",
        "--shortlist",
        "--prefix-cache",
        "--fill-on-finish",
        "--api-key",
        "a",
        "--api-key",
        "b",
    ]
    result = run("folder", *given)
    assert result.exit_code == 0, result.output
    made, host, port, level = started[0]
    assert (host, port, level) == ("::1", 9, "error")
    assert made == launch.Launch(
        "folder",
        name="n",
        device="cuda:1",
        dtype="bfloat16",
        engine={
            "width": 4, "requests": 5, "max_model_len": 6, "pages": 7, "kv_policy": "copy",
            "keep": 2, "kv_pressure": "none", "prefix_cache": True, "fill_on_finish": True,
            "backlog": 3, "order": "deepest", "mode": "csb",
            "min_coda_batch": 8, "drafts": 2, "routing": "host", "prefill_tokens": 9,
        },
        kv_memory=0.25,
        exits={"name": "margin", "threshold": 0.5, "strict": True, "decay": 4.0, "adapt": 0.4},
        exit_weights="gate.safetensors",
        shortlist=True,
        trace="steps.jsonl",
        chat_template="{{ messages }}",
        settings=launch.Settings(
            api_keys=("a", "b"), most_body=12, most_tokens=11, request_seconds=13, drain_seconds=14
        ),
        most_open=10,
        threads=3,
        ranks=2,
    )  # fmt: skip


def test_replicas_go_to_ray(started):
    assert run("pocket", "--replicas", "3", "--ray", "auto", "--gpus", "0.5").exit_code == 0
    ((made, count, more),) = started
    assert (made.model, count) == ("pocket", 3)
    assert more == {"host": "127.0.0.1", "port": 8000, "address": "auto", "gpus": 0.5}


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key", "a"], False),
        (["--host", "localhost"], False),
    ],
)
def test_an_open_door_is_told(started, options, warned):
    assert ("GEMMA_EXT_API_KEY asks for a key" in run(*options).output) == warned


def test_what_does_not_fit_is_one_sentence(started):
    result = run("--drain", "0")
    assert result.exit_code == 1
    assert "gemma-ext serve: --drain: expected more than 0, got 0.0" in result.output
    assert "Traceback" not in result.output
    result = run("--trace", "steps.jsonl", "--replicas", "2")
    assert "gemma-ext serve: --trace: expected one replica with it, got 2" in result.output
    result = run("--kv-policy", "guess", "--replicas", "2")
    assert "gemma-ext serve: --kv-policy: expected one of exact_lazy, " in result.output
    result = run("--exit", "guess", "--replicas", "2")
    assert "gemma-ext serve: --exit: expected one of none, max_prob, " in result.output
    assert len(started) == 0


@pytest.mark.parametrize(
    ("flag", "strict"), [("--exit-strict", True), ("--exit-at-threshold", False)]
)
def test_a_score_at_the_threshold_may_go_either_way(started, flag, strict):
    assert run(flag).exit_code == 0
    assert started[0][0].exits["strict"] is strict


def test_a_missing_package_is_named(started, monkeypatch):
    monkeypatch.setattr("gemma_ext.extras.find_spec", lambda name: None)
    result = run()
    assert result.exit_code == 1
    assert "gemma-ext serve needs fastapi, uvicorn" in result.output
    assert "pip install 'gemma_ext[serve]'" in result.output


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="model: expected pocket, a folder or the id of a hub"):
        launch.load_model(str(tmp_path / "none"), "cpu", None)
