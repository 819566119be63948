"""How long and how fast a dictionary is trained."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_ext.nn.sparse_autoencoder.dead import WINDOW

_REFERENCE_FEATURES = 2**14  # arXiv 2406.04093, 3.5: the rate falls with the root of F / 2^14
_REFERENCE_RATE = 2e-4


@dataclass(frozen=True)
class TrainConfig:
    """Schedule and optimiser; defaults are those of dictionary_learning where it has one.

    Args:
        steps: optimiser steps.
        learning_rate: peak; None for 2e-4 / sqrt(F / 2^14).
        warmup: share of the steps in which the rate rises from 0.
        decay: share of the steps in which it falls to 0 at the end.
        sparsity_warmup: share of the steps in which sparsity terms rise.
        betas: of Adam; (0, 0.999) is usual with JumpReLU.
        clip: largest norm of the gradients; None for none.
        dead_after: tokens without firing after which a latent is dead; None for 10M, or a tenth
            of the run where that is less.
        k_from: BatchTopK and TopK begin with this k and reach theirs at the end of
            `sparsity_warmup`; None for no annealing.
        bfloat16: products in bfloat16, weights in float32.
        log_every, save_every: steps between lines of metrics, and between checkpoints.

    Raises:
        ValueError: a number out of its range.
    """

    steps: int
    learning_rate: float | None = None
    warmup: float = 0.05
    decay: float = 0.2
    sparsity_warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    dead_after: int | None = None
    k_from: int | None = None
    bfloat16: bool = False
    log_every: int = 20
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("warmup", "decay", "sparsity_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")

    def rate(self, features: int) -> float:
        """Peak learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return _REFERENCE_RATE / (features / _REFERENCE_FEATURES) ** 0.5

    def factor(self, step: int) -> float:
        """Of the learning rate in step `step`, counted from 0."""
        rise, fall = self.warmup * self.steps, self.decay * self.steps
        up = (step + 1) / rise if rise else 1.0
        down = (self.steps - step) / fall if fall else 1.0
        return min(1.0, up, down)

    def warmth(self, step: int) -> float:
        """Of the sparsity terms."""
        rise = self.sparsity_warmup * self.steps
        return min(1.0, (step + 1) / rise) if rise else 1.0

    def window(self, batch: int) -> int:
        """Tokens after which a latent is dead."""
        if self.dead_after is not None:
            return self.dead_after
        return max(1, min(WINDOW, self.steps * batch // 10))
