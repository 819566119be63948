"""Problems of tests/ops on the device under test."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma_ext

sys.path.append(str(Path(__file__).parents[1] / "ops"))
import cce_oracle
from cce_oracle import Problem

DEVICE = os.environ.get("GEMMA_EXT_GPU_TESTS_ON", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The ways a gradient is made: in the forward, recomputed in full, sampled.
FORMS = {
    "fused": {"impl": "exact"},
    "recomputed": {"impl": "exact", "reduction": "none"},
    "sampled": {"impl": "cce", "filter_eps": 2.0**-4},
}
# Without an error of sampling; the last keeps every strip, through the sampler's code.
EXACT = {name: FORMS[name] for name in ("fused", "recomputed")} | {
    "kept": {"impl": "cce", "filter_eps": 1e-30}
}

Outcome = dict[str, Tensor]


def problem(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    **options: Any,
) -> Problem:
    """Random inputs, the same on every machine, a fifth of the rows ignored."""
    options = {"ignored": 0.2} | options
    p = cce_oracle.problem(n, d, v, bias=bias, dtype=dtype, **options)
    return Problem(*(None if t is None else t.to(DEVICE) for t in vars(p).values()))


def ours(p: Problem, **options: Any) -> Outcome:
    """Loss and gradients of the kernels; ``reduction`` is "sum" unless given."""
    options = {"reduction": "sum"} | options
    loss, grads = cce_oracle.run(gemma_ext.linear_cross_entropy, p, **options)
    return {"loss": loss.detach()} | {f"d{name}": grad for name, grad in grads.items()}


def truth(p: Problem, **options: Any) -> Outcome:
    """The same in float64 on the CPU."""
    here = Problem(*(None if t is None else t.cpu() for t in vars(p).values()))
    options = {k: v for k, v in options.items() if k not in ("impl", "filter_eps")}
    out, grads = cce_oracle.expected(here, **{"reduction": "sum"} | options)
    return {"loss": out.loss} | {f"d{name}": grad for name, grad in grads.items()}


def check(got: Outcome, want: Outcome, *, scale: float = 1.0) -> None:
    """``scale`` widens the limits of tests/ops."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        limits = cce_oracle.VALUE_TOL if name == "loss" else cce_oracle.GRAD_TOL
        cce_oracle.assert_close(value, want[name], rtol=scale * limits[value.dtype], what=name)


def assert_same_bits(a: Outcome, b: Outcome) -> None:
    for name in a:
        x, y = (t[name].reshape(-1).view(torch.uint8) for t in (a, b))
        assert torch.equal(x, y), f"{name}: other bits"


def need_memory(gigabytes: float) -> None:
    """Skip the test on a card with less memory free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes:.0f} GiB, {free / 2**30:.0f} GiB are free")
