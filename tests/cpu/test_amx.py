"""The kernels for AMX, on any machine through an emulation of its instructions."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
X86 = platform.machine() in ("x86_64", "AMD64")
WIDE = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
EMULATED = ["-DGEMMA_EXT_EMULATED_AMX", "-Wno-psabi"]


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_tile_instructions_and_products(tmp_path):
    compile_it = ["g++", "-std=c++20", "-O2", "-Wall", "-Wextra", f"-I{ROOT / 'csrc'}", "-c"]
    sources = {
        HERE / "amx.cpp": ["-DGEMMA_EXT_ISA=amxemulated", *EMULATED],
        ROOT / "csrc/common/cpu/isa.cpp": [],
        HERE / "tile_products.cpp": ["-DGEMMA_EXT_ISA=amxemulated", *EMULATED],
    }
    objects = []
    for source, flags in sources.items():
        objects.append(tmp_path / f"{source.stem}.o")
        system = ["-DGEMMA_EXT_X86"] if X86 else []
        run(*compile_it, *flags, *system, source, "-o", objects[-1])
    objects.append(tmp_path / "processor.o")
    if X86:
        flags = ["-DGEMMA_EXT_ISA=amxbf16", *WIDE, "-mamx-tile", "-mamx-bf16"]
    else:  # never called, for want of the processor
        flags = ["-DGEMMA_EXT_ISA=amxbf16", *EMULATED]
    run(*compile_it, *flags, HERE / "tile_products.cpp", "-o", objects[-1])
    run("g++", *objects, "-o", tmp_path / "amx")
    assert run(tmp_path / "amx").strip() in ("the processor agrees", "no AMX here")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The op library with the emulated instruction set beside the portable one."""
    build = tmp_path_factory.mktemp("emulated")
    run(
        "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DGEMMA_EXT_HOST=OFF",
        f"-DGEMMA_EXT_TORCH_DIR={Path(torch.__file__).parent}",
        "-DGEMMA_EXT_X86=OFF", "-DGEMMA_EXT_EMULATED_AMX=ON",
    )  # fmt: skip
    run("cmake", "--build", build, "--target", "_C")
    return build


@pytest.mark.parametrize("checks", ["checks_isa.py", "checks_sae_isa.py"])
def test_ops_on_emulated_tiles(library, checks):
    checks = ROOT / "tests/ops" / checks
    printed = run(
        sys.executable, checks,
        GEMMA_EXT_LIB_DIR=str(library), GEMMA_EXT_CPU_ISA="amxemulated", OMP_NUM_THREADS="1",
        PYTHONPATH=f"{ROOT}:{checks.parent}",
    )  # fmt: skip
    assert printed.strip() == "amxemulated"
