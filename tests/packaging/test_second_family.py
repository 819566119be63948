"""A family's folder, copied under another name, builds and registers beside the first."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FIRST, SECOND = "cce", "copied"

RUN_BOTH = f"""
import torch
torch.ops.load_library("_C.so")
e, c = torch.randn(5, 9), torch.randn(300, 9)
argument = {{"Tensor": None, "int": -100, "bool": False, "float": 1.0}}
def forward(family):
    op = getattr(torch.ops.gemma_ext, family + "_forward").default
    given = dict(e=e, c=c, targets=torch.arange(5), filter_eps=0.0)
    for a in op._schema.arguments:
        kind = str(a.type).removeprefix("Optional[").removesuffix("]")
        given.setdefault(a.name, argument[kind])
    return op(**given)
a, b = forward("{FIRST}"), forward("{SECOND}")
assert torch.equal(a[0], b[0]) and a[0].isfinite().all()
print(torch.ops.gemma_ext.cpu_isa())
"""


@pytest.fixture
def sources(root: Path, tmp_path: Path) -> Path:
    """The C++ sources with the second family, without CUDA."""
    shutil.copy(root / "CMakeLists.txt", tmp_path)
    shutil.copytree(root / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("cuda*"))
    copied = tmp_path / "csrc" / SECOND
    shutil.copytree(tmp_path / "csrc" / FIRST, copied)
    for path in copied.rglob("*"):
        if path.is_file():
            path.write_text(re.sub(rf"(?<![a-z]){FIRST}(?![a-z])", SECOND, path.read_text()))
    return tmp_path


def test_a_copied_family_links_and_registers_beside_the_first(sources, tmp_path):
    build = tmp_path / "build"
    configure = [
        "cmake", "-S", str(sources), "-B", str(build), "-G", "Ninja",
        f"-DGEMMA_EXT_TORCH_DIR={Path(torch.__file__).parent}",
        "-DGEMMA_EXT_HOST=OFF", "-DGEMMA_EXT_X86=OFF", "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS=-g0",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    for command in (configure, ["cmake", "--build", str(build), "--target", "_C"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [sys.executable, "-c", RUN_BOTH], cwd=build, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "baseline"


@pytest.mark.parametrize("family", sorted(p.parent.name for p in CSRC.glob("*/ops.cpp")))
def test_every_name_of_a_family_lies_in_its_own_namespace(family):
    """The linker would keep one of two inline functions that share a name, without a word."""
    for path in (CSRC / family).rglob("*.*"):
        for name in re.findall(r"^namespace (gemma_ext\S*) {", path.read_text(), re.MULTILINE):
            assert f"{name}::".startswith(f"gemma_ext::{family}::"), f"{path}: {name}"
