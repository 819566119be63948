"""What the machine can do, measured in the run whose numbers are divided by it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Ceilings:
    """GEMM rates in GFLOP/s and copy bandwidth (read and write counted) in GB/s."""

    gemm_fp32: float
    gemm_bf16: float
    copy: float

    @property
    def gemm(self) -> float:
        """The better of the two rates: what any implementation of either dtype may use."""
        return max(self.gemm_fp32, self.gemm_bf16)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure_ceilings(*, rows: int = 2048, width: int = 2304, panel: int = 2048) -> Ceilings:
    """Rates of a [rows, width] x [width, panel] product on random data, and of a 256 MB copy."""
    return Ceilings(
        gemm_fp32=_gemm(torch.float32, rows, width, panel),
        gemm_bf16=_gemm(torch.bfloat16, rows, width, panel),
        copy=_copy(256 << 20),
    )


def _gemm(dtype: torch.dtype, rows: int, width: int, panel: int) -> float:
    a = torch.randn(rows, width).to(dtype)
    b = torch.randn(panel, width).to(dtype)
    out = torch.empty(rows, panel, dtype=dtype)
    seconds = _best(lambda: torch.mm(a, b.T, out=out), repeats=5)
    return 2.0 * rows * width * panel / seconds / 1e9


def _copy(size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2.0 * size / _best(lambda: target.copy_(source), repeats=5) / 1e9


def _best(run: Callable[[], object], *, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
