"""The coefficient beta of the KL penalty, held or steered towards a target.

    err = clip(KL / KL* - 1, -limit, limit),   beta <- beta (1 + err n / horizon)

after n samples (arXiv 1909.08593, section 2.2).
"""

from __future__ import annotations

import math


class FixedKL:
    """beta as it was given."""

    def __init__(self, coef: float) -> None:
        self.coef = float(coef)

    def update(self, kl: float, samples: int) -> float:
        """beta for the next batch."""
        return self.coef

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = float(state["coef"])


class AdaptiveKL(FixedKL):
    """beta that brings the KL of a sequence to a target.

    Args:
        coef: of the first batch.
        target: KL*, nats per sequence.
        horizon: samples in which an error of 1 would double beta.
        limit: largest relative error that counts.
    """

    def __init__(
        self, coef: float, target: float, *, horizon: int = 10_000, limit: float = 0.2
    ) -> None:
        super().__init__(coef)
        for name, value in (("target", target), ("horizon", horizon), ("limit", limit)):
            if not value > 0:
                raise ValueError(f"expected {name} to be positive, got {value}")
        self.target, self.horizon, self.limit = target, horizon, limit

    def update(self, kl: float, samples: int) -> float:
        """beta after a batch of `samples` sequences (of all ranks) with mean KL `kl`, in nats.

        A batch without a KL, nan, leaves it.
        """
        if math.isnan(kl):
            return self.coef
        error = min(max(kl / self.target - 1, -self.limit), self.limit)
        # a batch of more than 1 / limit horizons would turn the sign
        self.coef *= max(0.0, 1 + error * samples / self.horizon)
        return self.coef
