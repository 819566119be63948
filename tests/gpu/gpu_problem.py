"""Problems on the device under test, their float64 truth, and how near to it a result has to be."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma_ext
from gemma_ext.reference import cce as reference

DEVICE = os.environ.get("GEMMA_EXT_GPU_TESTS_ON", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORE = -100
# The three ways a gradient is made: in the forward, recomputed in full, recomputed where it counts.
# The threshold is below the rounding of every sum here, so that no error of the filter shows.
FORMS = {
    "fused": {"impl": "exact"},
    "recomputed": {"impl": "exact", "reduction": "none"},
    "filtered": {"impl": "cce", "filter_eps": 2.0**-24},
}
KERNEL_OPTIONS = ("impl", "filter_eps", "state")
# One rounding of the gradient to its dtype and, in 16 bits, one of the logits' gradient.
GRADIENT_LIMIT = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
VALUE_LIMIT = 5e-6

Outcome = dict[str, Tensor]


@dataclass
class Problem:
    """A head and a batch: e [N, D], c [V, D], targets [N], bias [V] or None, all on one device."""

    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None = None

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh leaves by name, in their layout, or in another dtype."""
        named = {"e": self.e, "c": self.c, "bias": self.bias}
        return {
            name: t.detach().to(dtype or t.dtype).requires_grad_()
            for name, t in named.items()
            if t is not None
        }


def problem(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    ignored: float = 0.2,
    spread: float = 3.0,
    seed: int = 0,
) -> Problem:
    """Random inputs whose logits have a standard deviation of ``spread``; the same everywhere."""
    g = torch.Generator().manual_seed(seed + 1009 * n + 9176 * v + d)
    e = torch.randn(n, d, generator=g)
    c = torch.randn(v, d, generator=g) * (spread / math.sqrt(d))
    targets = torch.randint(0, v, (n,), generator=g)
    targets = targets.masked_fill(torch.rand(n, generator=g) < ignored, IGNORE)
    b = torch.randn(v, generator=g).to(DEVICE, dtype) if bias else None
    return Problem(e.to(DEVICE, dtype), c.to(DEVICE, dtype), targets.to(DEVICE), b)


def ours(p: Problem, **options: Any) -> Outcome:
    """Loss and gradients of the kernels; ``reduction`` is "sum" unless given."""
    return outcome(gemma_ext.linear_cross_entropy, p, p.leaves(), options)


def truth(p: Problem, **options: Any) -> Outcome:
    """The same in float64 with the logits materialised."""
    options = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
        if name not in KERNEL_OPTIONS
    }
    return outcome(reference.linear_cross_entropy, p, p.leaves(torch.float64), options)


def outcome(loss_of: Any, p: Problem, leaves: dict[str, Tensor], options: dict) -> Outcome:
    loss = loss_of(targets=p.targets, **leaves, **({"reduction": "sum"} | options))
    loss.sum().backward()
    return {"loss": loss.detach()} | {f"d{name}": t.grad for name, t in leaves.items()}


def check(got: Outcome, want: Outcome, *, scale: float = 1.0) -> None:
    """Shapes, nan positions, then relative errors; ``scale`` widens the limits."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.shape == want[name].shape, name
        assert torch.equal(value.isnan(), want[name].isnan()), f"{name}: nan positions differ"
        limit, floor = VALUE_LIMIT, 2e-6
        if name != "loss":
            # entries of fp16 are no nearer than its smallest subnormal
            limit = GRADIENT_LIMIT[value.dtype]
            floor = 1e-7 if value.dtype == torch.float16 else 1e-9
        found = error(value, want[name], floor=scale * floor / limit)
        assert found <= scale * limit, f"{name}: relative error {found:.2e} > {scale * limit:.1e}"


def error(got: Tensor, want: Tensor, *, floor: float = 0.0) -> float:
    """||got - want|| / (||want|| + floor sqrt(entries)) in float64, without nan."""
    gap = (got.double() - want.double()).nan_to_num(0.0)
    size = want.double().nan_to_num(0.0).norm() + floor * math.sqrt(max(want.numel(), 1))
    return float(gap.norm() / size.clamp(min=1e-300))


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
