"""Every build of the kernels this processor can run, each in a process of its own."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NEEDS = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    "amxbf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "amx_tile", "amx_bf16"},
}


def is_intel() -> bool:
    return "GenuineIntel" in Path("/proc/cpuinfo").read_text()


def may_use_tiles() -> bool:
    """Whether Linux grants the tiles of AMX: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)."""
    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


def runnable() -> list[str]:
    """Names of the builds, slowest first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["baseline"]
    with open("/proc/cpuinfo") as f:
        flags = next(set(line.split()) for line in f if line.startswith("flags"))
    names = [name for name, needs in NEEDS.items() if needs <= flags]
    return [name for name in names if name != "amxbf16" or may_use_tiles()]


def run_script(script: str | Path, isa: str | None) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "GEMMA_EXT_CPU_ISA"}
    env |= {"OMP_NUM_THREADS": "1"} | ({} if isa is None else {"GEMMA_EXT_CPU_ISA": isa})
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    return subprocess.run(
        [sys.executable, *(["-c"] if isinstance(script, str) else []), script],
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.parametrize("isa", runnable())
def test_build_matches_float64(isa):
    done = run_script(HERE / "checks_isa.py", isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


def test_the_fastest_one_is_chosen():
    fast = [isa for isa in runnable() if isa != "avx512bf16" or not is_intel()]
    done = run_script("import torch, gemma_ext; print(torch.ops.gemma_ext.cpu_isa())", None)
    assert done.stdout.strip() == fast[-1]


def test_an_unknown_build_is_refused():
    script = (
        "import torch, gemma_ext\n"
        "e, c = torch.randn(2, 8), torch.randn(5, 8)\n"
        "gemma_ext.linear_cross_entropy(e, c, torch.tensor([1, 2]))"
    )
    done = run_script(script, "sse9")
    assert done.returncode == 1
    assert (
        "expected GEMMA_EXT_CPU_ISA to be baseline, avx2, avx512, avx512bf16 or amxbf16"
        in done.stderr
    )
    assert "got sse9" in done.stderr
