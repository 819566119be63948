"""`_C_cuda.so` beside `_C.so`: optional, its absence explained, its options read by setup.py."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cmake
import ninja
import pytest
import torch

from gemma_ext import _loader, info, linear_cross_entropy
from gemma_ext.ops.cce import inputs

REPORT = """
import gemma_ext
from gemma_ext import _loader, info
status = _loader.load()
print(status.cuda_path)
print(status.cuda_error)
info.main()
"""


@pytest.fixture
def folder(root, tmp_path) -> Path:
    """A copy of the op library and nothing of CUDA."""
    for name in ("_C.so", "build_info.json"):
        shutil.copy(root / "gemma_ext" / name, tmp_path)
    return tmp_path


@pytest.fixture
def load(python, folder) -> Callable[..., tuple[str, str, str]]:
    """Load from `folder` in a new process: cuda_path, cuda_error, what `info` prints."""

    def run(**environment: str) -> tuple[str, str, str]:
        settings = {"GEMMA_EXT_LIB_DIR": str(folder), "GEMMA_EXT_DISABLE_CUDA": "0"}
        done = python(REPORT, **{**settings, **environment})
        assert done.returncode == 0, done.stderr
        return tuple(done.stdout.split("\n", 2))

    return run


def compile_library(folder: Path, source: str) -> None:
    (folder / "cuda.cpp").write_text(source)
    command = ["g++", "-shared", "-fPIC", "-o", folder / "_C_cuda.so", folder / "cuda.cpp"]
    subprocess.run(command, check=True)


def test_missing_library_is_a_reason_and_no_error(load, folder):
    path, error, printed = load()
    assert path == "None"
    assert error == f"not built: there is no {folder / '_C_cuda.so'}"
    assert f"none: {error}" in printed


def test_library_that_loads_is_named(load, folder):
    compile_library(folder, "")
    path, error, printed = load()
    assert (path, error) == (str(folder / "_C_cuda.so"), "None")
    assert path in printed
    assert "kernels   loaded" in printed


def test_disabled_library_is_left_alone(load, folder):
    compile_library(folder, "#include <stdlib.h>\nstatic int loaded = (abort(), 0);")
    path, error, printed = load(GEMMA_EXT_DISABLE_CUDA="1")
    assert (path, error) == ("None", "disabled by GEMMA_EXT_DISABLE_CUDA")
    assert f"none: {error}" in printed


def test_unresolved_symbol_keeps_the_linkers_text(load, folder):
    compile_library(folder, "int absent_function(); int call() { return absent_function(); }")
    path, error, printed = load()
    assert path == "None"
    assert "undefined symbol: _Z15absent_functionv" in error
    assert f"torch {torch.__version__} is installed" in error
    assert error in printed


def test_truncated_library_is_named_before_it_is_mapped(load, folder):
    compile_library(folder, "")
    library = folder / "_C_cuda.so"
    library.write_bytes(library.read_bytes()[:-1000])
    path, error, _ = load()
    assert (path, error) == ("None", f"{library} is truncated: build or install it again")


def test_reloaded_module_accepts_the_library_it_finds(python, folder):
    compile_library(folder, "")
    code = """
import sys, gemma_ext
from importlib import import_module
del sys.modules["gemma_ext._loader"]
print(import_module("gemma_ext._loader").load().cuda_path)
"""
    done = python(code, GEMMA_EXT_LIB_DIR=str(folder), GEMMA_EXT_DISABLE_CUDA="0")
    assert done.stdout == f"{folder / '_C_cuda.so'}\n", done.stderr


def without_cuda(monkeypatch, reason: str) -> None:
    status = _loader.LibraryStatus(_loader.load().path, _loader.load().record, None, reason)
    monkeypatch.setattr(_loader, "_status", status)
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: key != "CUDA"
    )


def test_refusal_names_the_reason_and_the_remedy(monkeypatch):
    without_cuda(monkeypatch, "not built: there is no file")
    assert _loader.cuda_refusal("cce_forward") == (
        "gemma_ext::cce_forward has no CUDA kernel here (not built: there is no file); "
        "build with GEMMA_EXT_CUDA=ON, or use impl='reference'"
    )


def test_op_with_a_cuda_kernel_is_not_refused(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    assert _loader.cuda_refusal("cce_forward") is None


class OnCuda(torch.Tensor):
    """Values on the CPU that say they are elsewhere."""

    @property
    def device(self):
        return torch.device("cuda:0")


@pytest.mark.parametrize("impl", ["auto", "cce", "exact"])
def test_cuda_tensors_without_kernels_are_refused_not_materialised(monkeypatch, impl):
    monkeypatch.setattr(inputs, "_CUDA_REFUSAL", "no CUDA kernel, use impl='reference'")
    e, c, targets = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=r"use impl='reference', which holds the logits"):
        linear_cross_entropy(*(x.as_subclass(OnCuda) for x in (e, c, targets)), impl=impl)


@pytest.mark.parametrize(
    ("cuda", "available", "expected"),
    [
        (None, False, "is built without CUDA"),
        ("13.0", False, "CUDA 13.0, no device visible"),
        ("13.0", True, "CUDA 13.0, H200, compute capability 9.0"),
    ],
)
def test_info_says_what_torch_sees(monkeypatch, cuda, available, expected):
    device = SimpleNamespace(
        is_available=lambda: available,
        get_device_name=lambda index: "H200",
        get_device_capability=lambda index: (9, 0),
    )
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch, "cuda", device)
    assert expected in info.report()["cuda"]["torch"]
    status = _loader.LibraryStatus(
        Path("_C.so"), {"cuda_compiler": "nvcc 13.0", "cuda_archs": ["90a"]}, Path(__file__)
    )
    kernels = "loaded" if available else "loaded, nothing here to run them on"
    assert info._cuda(status)["kernels"] == kernels
    assert info._cuda(status)["compiler"] == "nvcc 13.0, for 90a"


@pytest.fixture
def settings(root, tmp_path, monkeypatch) -> dict:
    """The functions of setup.py, on a machine without nvcc."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for name in ("GEMMA_EXT_CUDA", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(root / "setup.py"))


def add_nvcc(folder: Path, version: str) -> Path:
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_on_without_a_compiler_is_one_sentence(settings, monkeypatch):
    monkeypatch.setenv("GEMMA_EXT_CUDA", "ON")
    with pytest.raises(SystemExit, match=r"CUDA=ON needs a CUDA compiler.*found no nvcc"):
        settings["cuda_compiler"]()


def test_auto_without_a_compiler_goes_on_and_says_why(settings):
    nvcc, reason = settings["cuda_compiler"]()
    assert nvcc is None
    assert "found no nvcc" in reason
    assert "_C_cuda" not in settings["library_names"]()


def test_auto_leaves_out_what_an_old_compiler_cannot_build(settings, tmp_path):
    nvcc = add_nvcc(tmp_path, "12.4")
    assert settings["cuda_compiler"]() == (None, f"{nvcc} is 12.4, older than 12.9")


def test_off_looks_for_no_compiler(settings, tmp_path, monkeypatch):
    add_nvcc(tmp_path, "13.0")
    monkeypatch.setenv("GEMMA_EXT_CUDA", "off")
    assert settings["cuda_compiler"]() == (None, "")


@pytest.mark.parametrize("through", ["PATH", "CUDACXX", "CUDA_HOME"])
def test_compiler_is_found(settings, tmp_path, monkeypatch, through):
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    nvcc = add_nvcc(tmp_path / "toolkit" / "bin", "13.0")
    places = {"PATH": nvcc.parent, "CUDACXX": nvcc, "CUDA_HOME": nvcc.parents[1]}
    monkeypatch.setenv(through, str(places[through]))
    assert settings["find_nvcc"]() == (str(nvcc), "")


@pytest.mark.parametrize("sources", [True, False])
def test_cuda_is_built_where_there_is_something_to_build(settings, tmp_path, monkeypatch, sources):
    nvcc = add_nvcc(tmp_path, "13.0")
    monkeypatch.setitem(settings["cuda_compiler"].__wrapped__.__globals__, "ROOT", tmp_path)
    (tmp_path / "csrc" / "family").mkdir(parents=True)
    if sources:
        (tmp_path / "csrc" / "family" / "cuda_ops.cpp").touch()
    found, reason = settings["cuda_compiler"]()
    assert found == (str(nvcc) if sources else None)
    assert reason == ("" if sources else "these sources have no CUDA kernels")
    assert ("_C_cuda" in settings["library_names"]()) == sources


def test_unknown_choice_is_refused(root):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=root,
        env={**os.environ, "GEMMA_EXT_CUDA": "maybe"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "GEMMA_EXT_CUDA: expected AUTO, ON or OFF, got MAYBE"


@pytest.mark.parametrize(("archs", "chosen"), [("80;90a", True), ("80;90;90-virtual", False)])
def test_hopper_is_chosen_only_where_its_code_is_built(root, tmp_path, archs, chosen):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    configure = [
        Path(cmake.CMAKE_BIN_DIR) / "cmake", "-S", root, "-B", tmp_path, "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
        f"-DGEMMA_EXT_TORCH_DIR={Path(torch.__file__).parent}",
        "-DGEMMA_EXT_HOST=OFF", "-DGEMMA_EXT_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DGEMMA_EXT_CUDA_ARCHS={archs}",
    ]  # fmt: skip
    subprocess.run(configure, check=True, capture_output=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    of_kernels = [c["command"] for c in commands if c["file"].endswith(".cu")]
    assert of_kernels
    assert all(("-DGEMMA_EXT_SM90A" in command) == chosen for command in of_kernels)
