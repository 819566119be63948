"""FREE's adaptive threshold: where early tokens are more likely right than wrong.

Bae et al. 2023, arXiv 2310.05424. Of tokens that ran all loops, confidences at the exit c are two
Beta distributions: of those whose early argmax was the final one, and of the others. The threshold
is the least c above the mean of the wrong ones, below which a tail may be right again, with

    f_right(c) / (f_right(c) + f_wrong(c)) > zeta

Both are fitted by their moments m and s^2: alpha = m (m (1 - m) / s^2 - 1) and
beta = alpha (1 - m) / m. The classes count alike, as in the authors' program, whose zeta is 0.4;
that one looks at ten places of [0, 1], this one at 1001, and at the last pairs instead of those of
the first sentences.
"""

from __future__ import annotations

from collections import deque
from math import lgamma

import numpy as np

ZETA = 0.4
LEAST = 16  # pairs of a class, for moments that mean something
WINDOW = 2048  # pairs
EVERY = 32  # new pairs, until the next fit
_PLACES = np.linspace(0.0, 1.0, 1001)
_EDGE = 1e-4  # a Beta density may be infinite at 0 and 1


class AdaptiveThreshold:
    """Pairs of a confidence and whether the early token was right, and what follows from them.

    Args:
        zeta: in (0, 1); more of it lets fewer tokens go.

    Attributes:
        value: the threshold; None until there are `LEAST` pairs of each class.
    """

    def __init__(self, zeta: float = ZETA) -> None:
        self.zeta = zeta
        self.value: float | None = None
        self._pairs: deque[tuple[float, bool]] = deque(maxlen=WINDOW)
        self._new = 0

    def add(self, confidence: np.ndarray, right: np.ndarray) -> None:
        """Takes pairs [n]; a confidence of NaN is none."""
        known = ~np.isnan(confidence)
        self._pairs.extend(zip(confidence[known].tolist(), right[known].tolist(), strict=True))
        self._new += int(known.sum())
        if self._new >= EVERY:
            self._new = 0
            self._fit()

    def _fit(self) -> None:
        confidence, right = (np.array(column) for column in zip(*self._pairs, strict=True))
        groups = [confidence[right == kind].clip(_EDGE, 1 - _EDGE) for kind in (False, True)]
        if min(map(len, groups)) < LEAST or min(group.std() for group in groups) == 0:
            return
        places = _PLACES.clip(_EDGE, 1 - _EDGE)
        wrong, fits = (_log_density(group, places) for group in groups)
        passes = (wrong - fits < np.log(1 / self.zeta - 1)) & (places > groups[0].mean())
        self.value = float(_PLACES[passes.argmax()]) if passes.any() else 1.0


def _log_density(sample: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Of the Beta distribution with the moments of a sample."""
    m, s2 = sample.mean(), sample.var()
    alpha = m * (m * (1 - m) / s2 - 1)
    beta = alpha * (1 - m) / m
    norm = lgamma(alpha + beta) - lgamma(alpha) - lgamma(beta)
    return norm + (alpha - 1) * np.log(at) + (beta - 1) * np.log1p(-at)
