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


def measure_ceilings(device: str = "cpu") -> Ceilings:
    """Rates of a matrix product on random data and of a copy, large enough to fill the device.

    [2048, 2304] x [2304, 2048] and 256 MB on a CPU, [8192, 8192] x [8192, 8192] and 2 GB on a card.
    """
    rows, width, panel, size = (2048, 2304, 2048, 256 << 20)
    if device == "cuda":
        rows, width, panel, size = (8192, 8192, 8192, 2 << 30)
    return Ceilings(
        gemm_fp32=_gemm(torch.float32, rows, width, panel, device),
        gemm_bf16=_gemm(torch.bfloat16, rows, width, panel, device),
        copy=_copy(size, device),
    )


def _gemm(dtype: torch.dtype, rows: int, width: int, panel: int, device: str) -> float:
    a = torch.randn(rows, width, device=device).to(dtype)
    b = torch.randn(panel, width, device=device).to(dtype)
    out = torch.empty(rows, panel, dtype=dtype, device=device)
    seconds = _best(lambda: torch.mm(a, b.T, out=out), device, repeats=5)
    return 2.0 * rows * width * panel / seconds / 1e9


def _copy(size: int, device: str) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / _best(lambda: target.copy_(source), device, repeats=5) / 1e9


def _best(run: Callable[[], object], device: str, *, repeats: int) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = float("inf")
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - start)
    return best
