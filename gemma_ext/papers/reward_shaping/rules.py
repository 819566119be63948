"""The rules of reward shaping that need no memory: r [B], references q [B, M], mask [B, M].

| function     | of one row                                                       |
|--------------|------------------------------------------------------------------|
| `penalised`  | r - w max(0, T - n0)                                             |
| `centred`    | mean_m (r - q_m)                                                 |
| `sigmoid`    | mean_m sigma(k (r - q_m)): PAR; sigma(k r) without references    |
| `tanh`       | mean_m tanh(r - q_m)                                             |
| `polynomial` | mean_m P(r - q_m), P the fit of sigma of degree 5                |
| `sgfc`       | mean_m sigma(k (r - 3 - q_m))                                    |
| `quantile`   | share of references below r, ties count half: PAR for k to inf   |
| `lsc`        | log sigma(r - Q), Q the normal quantile of the references        |

All are differentiable in r and keep its dtype. The mean of sigmoids is not the sigmoid of the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

# least squares of sigma on 100 even points of [-5, 5]: x^5, x^3, x, 1; even powers vanish
POLYNOMIAL = (2.0266916983218e-4, -1.0130912056492e-2, 2.2878851177826e-1, 0.5)
EDGE = 5.0  # of the fit; it is 0 below and 1 above
SGFC_SHIFT = 3.0
LSC_LEVEL = 0.85
LSC_FLOOR = 1e-5  # added to the standard deviation


def penalised(r: Tensor, lengths: Tensor, start: float = 300, weight: float = 0.01) -> Tensor:
    """r - weight * max(0, T - start) for responses of T tokens."""
    return r - weight * (lengths.to(r.dtype) - start).clamp(min=0)


def centred(r: Tensor, q: Tensor, mask: Tensor | None = None) -> Tensor:
    return _mean(lambda u: u, r, q, mask)


def sigmoid(
    r: Tensor, q: Tensor | None = None, mask: Tensor | None = None, k: float = 1.0
) -> Tensor:
    """PAR: the reward model's own mean probability that r beats a reference; in (0, 1)."""
    return _mean(lambda u: torch.sigmoid(k * u), r, q, mask)


def tanh(r: Tensor, q: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """2 PAR - 1 at k = 2."""
    return _mean(torch.tanh, r, q, mask)


def polynomial(r: Tensor, q: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """It jumps by 0.0109 at +-5, where the fit leaves [0, 1]."""
    return _mean(_fit, r, q, mask)


def sgfc(r: Tensor, q: Tensor, mask: Tensor | None = None, k: float = 1.0) -> Tensor:
    """Slow growth, fast convergence."""
    return sigmoid(r - SGFC_SHIFT, q, mask, k)


def quantile(r: Tensor, q: Tensor, mask: Tensor | None = None) -> Tensor:
    """Empirical quantile of r among its references, the limit of PAR for k to infinity.

    The other end, k to 0, is linear: (4 / k) (PAR - 1/2) goes to `centred`.
    """
    return _mean(lambda u: 0.5 * (1 + torch.sign(u)), r, q, mask)


def lsc(r: Tensor, q: Tensor, mask: Tensor | None = None, level: float = LSC_LEVEL) -> Tensor:
    """Log-sigmoid-centred; needs two references a row for their sample standard deviation."""
    return F.logsigmoid(r - normal_quantile(q, mask, level))


def normal_quantile(q: Tensor, mask: Tensor | None = None, level: float = LSC_LEVEL) -> Tensor:
    """mean(q) + z_level (std(q) + 1e-5), the standard deviation that of a sample."""
    count = _count(q, mask)
    mean = _over(q, mask) / count
    spread = _over((q - mean[:, None]) ** 2, mask) / (count - 1)
    return mean + NormalDist().inv_cdf(level) * (spread.sqrt() + LSC_FLOOR)


def _fit(u: Tensor) -> Tensor:
    a, b, c, d = POLYNOMIAL
    inside = ((a * u**2 + b) * u**2 + c) * u + d
    return torch.where(u <= -EDGE, 0.0, torch.where(u >= EDGE, 1.0, inside))


def _mean(
    f: Callable[[Tensor], Tensor], r: Tensor, q: Tensor | None, mask: Tensor | None
) -> Tensor:
    """f(r), or the mean of f(r - q_m) over the references that the mask keeps."""
    if q is None:
        return f(r)
    if mask is not None:  # before f: a gradient of 0 times NaN is NaN
        q = torch.where(mask, q, 0.0)
    return _over(f(r[:, None] - q), mask) / _count(q, mask)


def _over(values: Tensor, mask: Tensor | None) -> Tensor:
    # where, not a product: what is masked may be NaN
    return (values if mask is None else torch.where(mask, values, 0.0)).sum(1)


def _count(q: Tensor, mask: Tensor | None) -> Tensor | float:
    return float(q.shape[1]) if mask is None else mask.sum(1).to(q.dtype)
