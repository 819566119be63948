"""Every build of the kernels this processor can run, each in a process of its own."""

from __future__ import annotations

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
}


def is_intel() -> bool:
    return "GenuineIntel" in Path("/proc/cpuinfo").read_text()


def runnable() -> list[str]:
    """Names of the builds, slowest first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["baseline"]
    with open("/proc/cpuinfo") as f:
        flags = next(set(line.split()) for line in f if line.startswith("flags"))
    return [name for name, needs in NEEDS.items() if needs <= flags]


SCRIPT = """
import sys
import torch
from cce_filter_oracle import filtered, gap_eps, zipf_problem
from cce_impls import KERNELS
from cce_oracle import GRAD_TOL, assert_close, check, expected, problem, run
import gemma_ext

print(torch.ops.gemma_ext.cpu_isa())
torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for d, v, n in ((1, 2, 1), (7, 257, 15), (130, 1000, 129), (257, 255, 14), (2304, 300, 33)):
        for softcap, spread in ((None, 3.0), (5.0, 3.0), (30.0, 40.0)):
            p = problem(n, d, v, spread=spread, ignored=0.2, dtype=dtype, seed=d)
            want = expected(p, softcap=softcap, reduction="sum")
            flags = {"return_lse": True, "return_entropy": True, "return_argmax": True}
            for impl in KERNELS:
                got = run(impl.loss, p, softcap=softcap, reduction="sum")
                check(got, want, scale=5, floor=1e-6)
                out, _ = run(impl.loss, p, softcap=softcap, reduction="sum", **flags)
                check((out, got[1]), want, scale=5, floor=1e-6)
    p = zipf_problem(70, 37, 1500, dtype=dtype, seed=1)
    u = torch.ones(70)
    eps = gap_eps(filtered(p, u, eps=1.0, softcap=8.0).ratio, 2.0**-8)
    want = filtered(p, u, eps=eps, softcap=8.0)
    _, got = run(gemma_ext.linear_cross_entropy, p, softcap=8.0, impl="cce", filter_eps=eps,
                 reduction="sum")
    for name in got:
        assert_close(got[name], want.grads[name], rtol=5 * GRAD_TOL[dtype], what=name)
"""


def run_script(script: str, isa: str | None) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "GEMMA_EXT_CPU_ISA"}
    env |= {"OMP_NUM_THREADS": "1"} | ({} if isa is None else {"GEMMA_EXT_CPU_ISA": isa})
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    return subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=250
    )


@pytest.mark.parametrize("isa", runnable())
def test_build_matches_float64(isa):
    done = run_script(SCRIPT, isa)
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
    assert "expected GEMMA_EXT_CPU_ISA to be baseline, avx2, avx512 or avx512bf16" in done.stderr
    assert "got sse9" in done.stderr
