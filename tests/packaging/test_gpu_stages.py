"""The stages of `make gpu` without a card: limits, failures, what cannot run, the summary."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import ModuleType

import pytest


@pytest.fixture
def gpu(root, tmp_path, monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_stages", root / ".ci" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "OUT", tmp_path / "gpu")
    return module


def summary(said: str) -> list[str]:
    return said.split("== summary\n")[1].splitlines()


def python(code: str):
    return lambda stage: stage.run(sys.executable, "-c", code)


def test_a_failure_stops_nothing_and_is_summed_up(gpu, capfd, monkeypatch):
    stages = {"build": python("raise SystemExit(3)"), "tests": python("print('in the tests')")}
    monkeypatch.setattr(gpu, "STAGES", stages)
    assert gpu.main([]) == 1
    said = capfd.readouterr().out
    assert "in the tests" in said
    build, tests, _ = summary(said)
    assert "FAILED with status 3" in build
    assert tests.endswith("passed")
    assert "in the tests" in (gpu.OUT / "tests.log").read_text()


def test_a_stage_that_takes_too_long_is_ended_with_its_children(gpu, capfd, monkeypatch):
    sleeper = "import subprocess; subprocess.run(['sleep', '60'])"
    monkeypatch.setattr(gpu, "STAGES", {"build": python(sleeper), "tests": python("")})
    monkeypatch.setitem(gpu.LIMITS, "build", 1.0)
    start = time.monotonic()
    assert gpu.main([]) == 1
    assert time.monotonic() - start < 20
    build, tests, _ = summary(capfd.readouterr().out)
    assert "status 124" in build
    assert tests.endswith("passed")


def test_only_a_missing_sanitizer_is_no_failure(gpu, capfd, monkeypatch):
    def absent(stage):
        raise gpu.NotRun("it is not here")

    monkeypatch.setattr(gpu, "STAGES", {"sanitizer": absent})
    assert gpu.main([]) == 0
    assert "not run: it is not here" in summary(capfd.readouterr().out)[0]
    monkeypatch.setattr(gpu, "STAGES", {"tests": absent})
    assert gpu.main([]) == 1


def commands_of(gpu, monkeypatch, name: str, device: str) -> list[list[str]]:
    """What a stage would run on a device."""
    ran = []

    def note(stage, *command, **environment):
        ran.append([str(word) for word in command])
        return 0

    monkeypatch.setattr(gpu, "DEVICE", device)
    monkeypatch.setattr(gpu.Stage, "run", note)
    assert gpu.STAGES[name](gpu.Stage(name, time.monotonic() + 60)) == 0
    return ran


@pytest.mark.parametrize("name", ["step", "sweep", "bench"])
def test_only_what_a_card_measures_is_saved(gpu, monkeypatch, name):
    (on_card,) = commands_of(gpu, monkeypatch, name, "cuda")
    (on_cpu,) = commands_of(gpu, monkeypatch, name, "cpu")
    assert on_card[2:4] == ["--device", "cuda"]
    assert "--save" in on_card
    assert on_cpu[2:4] == ["--device", "cpu"]
    assert "--save" not in on_cpu


@pytest.mark.parametrize(
    ("stage", "script", "tests"),
    [
        ("souping", "bench_souping_card.py", "test_gpu_soup.py"),
        ("sae", "bench_sae_card.py", "test_gpu_sae.py"),
        ("depth", "bench_depth_kv.py", "test_gpu_depth_kv.py"),
        ("heads", "bench_depth_linear.py", "test_gpu_depth_linear.py"),
    ],
)
def test_a_stage_measures_and_tests(gpu, monkeypatch, stage, script, tests):
    measured, own, ops = commands_of(gpu, monkeypatch, stage, "cuda")
    assert measured[1] == f"benchmarks/{script}"
    assert "--save" in measured
    assert own[-1].endswith(tests)
    assert ops[ops.index("-k") + 1].split()[0] == "cuda"
    assert not any(path.name == tests for path in gpu.test_files())
    measured, own = commands_of(gpu, monkeypatch, stage, "cpu")
    assert "--save" not in measured


def test_without_a_card_nothing_is_built_for_one(gpu, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu.Stage, "run", lambda stage, *words, **env: seen.append(env) or 0)
    assert gpu.build(gpu.Stage("build", time.monotonic() + 60)) == 0
    assert seen[0]["GEMMA_EXT_CUDA"] == "OFF"


def test_a_step_needs_transformers(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    with pytest.raises(gpu.NotRun, match="transformers"):
        gpu.step(gpu.Stage("step", time.monotonic() + 60))


def test_unknown_stages_are_named(gpu):
    with pytest.raises(SystemExit, match="'fly'"):
        gpu.main(["fly"])


@pytest.mark.parametrize(
    ("capability", "target"),
    [("8.0", "80"), ("8.9", "89"), ("9.0", "90a"), ("10.3", "100f"), ("12.0", "120f")],
)
def test_the_target_fits_the_card(gpu, capability, target):
    assert gpu.target_of(capability) == target


def test_the_target_can_be_chosen(gpu, monkeypatch):
    monkeypatch.setenv("GEMMA_EXT_CUDA_ARCHS", "80;86")
    assert gpu.card_arch() == "80;86"
