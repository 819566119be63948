"""Bit for bit the same: run after run, with one thread or two, whatever memory held before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cce_filter_oracle import zipf_problem
from cce_impls import DEVICES, KERNELS, Impl
from cce_oracle import check, expected, problem, run

from gemma_ext.testing import poisoned_empty

SAMPLED = [Impl("cce", 2.0**-8, device) for device in DEVICES]
MODES = [*KERNELS, *SAMPLED]
IDS = [f"{impl}-sampled" if impl in SAMPLED else str(impl) for impl in MODES]


def everything(impl: Impl, p, reduction: str = "mean") -> list[torch.Tensor]:
    flags = {"return_lse": True, "return_entropy": True, "return_argmax": True}
    out, grads = run(impl.loss, p, softcap=10.0, reduction=reduction, **flags)
    bare, bare_grads = run(impl.loss, p, softcap=10.0, reduction=reduction)
    return [
        *(out.loss, out.lse, out.entropy, out.argmax, *grads.values()),
        *(bare, *bare_grads.values()),
    ]


@pytest.mark.parametrize("impl", MODES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_ten_runs_are_equal(impl, dtype):
    torch.set_num_threads(2)
    p = zipf_problem(150, 136, 2300, ignored=0.2, dtype=dtype, seed=1)
    first = everything(impl, p)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(impl, p), strict=True))


@pytest.mark.parametrize("impl", MODES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [7, 600])
def test_thread_count_does_not_matter(impl, dtype, n):
    p = zipf_problem(n, 136, 2300, ignored=0.2, dtype=dtype, seed=2)
    torch.set_num_threads(1)
    one = everything(impl, p)
    torch.set_num_threads(2)
    two = everything(impl, p)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("n", [1, 130, 700])
def test_two_threads_are_right(impl, n):
    torch.set_num_threads(2)
    p = problem(n, 136, 1500, ignored=0.2, seed=3)
    check(run(impl.loss, p, softcap=5.0), expected(p, softcap=5.0))


@pytest.mark.parametrize("impl", MODES, ids=IDS)
@pytest.mark.parametrize("d", [5, 136])
def test_unwritten_memory_is_never_read(impl, d):
    """torch.empty full of NaN changes no bit."""
    for n in (1, 65):
        p = zipf_problem(n, d, 700, ignored=0.3, seed=4)
        clean = everything(impl, p, "none")
        with poisoned_empty():
            dirty = everything(impl, p, "none")
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


SCRIPT = """
import hashlib, sys
import torch
from cce_filter_oracle import zipf_problem
from test_cce_determinism import MODES, everything
digest = hashlib.sha256()
for impl in MODES:
    for dtype in (torch.float32, torch.bfloat16):
        p = zipf_problem(65, 37, 700, ignored=0.3, dtype=dtype, seed=5)
        for t in everything(impl, p, "none"):
            digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_heap_contents_do_not_matter():
    """glibc fills every block it hands out with a byte: two patterns, one result."""
    here = os.path.dirname(os.path.abspath(__file__))
    digests = set()
    for pattern in ("1", "128"):
        env = os.environ | {"MALLOC_PERTURB_": pattern, "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(os.path.dirname(here)), here])
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert len(digests) == 1
