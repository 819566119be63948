"""How strong: the largest alignment among strengths whose text stays clean.

    score(s) = share of outputs that show the trait, where the share that is clean is at least 0.9

The release searches [-300, 300] by thirds, 8 steps of 15 prompts, and then looks at 11 strengths
around the best. Where one output in twenty is unclean at every strength, chance shuts its gate in a
sixth of the steps, and the search leaves for good the side it should have stayed on: one run in
twelve ends below three quarters of the alignment, and one in four where one output in twelve is.
Here as many outputs are spent on an even grid in one batch: all strengths on the same prompts, but
each with draws of its own, since draws in common shut the gate at all strengths at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

CLEAN = 0.9  # the release's gate
PROMPTS = 15  # the release's
STRENGTHS = 27  # 405 outputs of 15 prompts, as many as the release's search takes


@dataclass(frozen=True)
class Trial:
    """Shares in [0, 1] over the prompts at one strength."""

    strength: float
    aligned: float
    clean: float
    prompts: int

    @property
    def clean_bound(self) -> float:
        """Wilson's 95 % lower bound of `clean`."""
        z, n, p = 1.96, self.prompts, self.clean
        middle = p + z * z / (2 * n)
        return (middle - z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)


Measure = Callable[[Sequence[float]], Sequence[Trial]]
"""Trials of strengths, all on the same prompts, each with its own draws."""


def grid(
    measure: Measure, low: float = -300.0, high: float = 300.0, count: int = STRENGTHS
) -> list[Trial]:
    """Trials at `count` even strengths from low to high."""
    if count < 2 or not low < high:
        raise ValueError(f"expected low < high and count of 2 or more, got {low}, {high}, {count}")
    return list(measure([low + (high - low) * i / (count - 1) for i in range(count)]))


def best(trials: Sequence[Trial], clean: float = CLEAN) -> Trial:
    """The most aligned trial that is clean, of equals the weakest.

    Raises:
        ValueError: no trial is clean.
    """
    fit = [trial for trial in trials if trial.clean >= clean]
    if not fit:
        top = max((trial.clean for trial in trials), default=0.0)
        raise ValueError(f"trials: expected one at least {clean} clean, got {top} at most")
    return max(fit, key=lambda trial: (trial.aligned, -abs(trial.strength)))


def best_layer(of_layers: Mapping[int, Sequence[Trial]]) -> tuple[int, Trial]:
    """The layer, and its `best`, that aligns most; layers without a clean trial take no part.

    Raises:
        ValueError: no trial of any layer is clean.
    """
    clean = {at: some for at, some in of_layers.items() if any(t.clean >= CLEAN for t in some)}
    fit = {layer: best(some) for layer, some in (clean or of_layers).items()}
    layer = max(fit, key=lambda at: fit[at].aligned)
    return layer, fit[layer]


def by_thirds(measure: Measure, low: float = -300.0, high: float = 300.0, steps: int = 8) -> Trial:
    """The release's search, for comparison: thirds, then 11 strengths within 30 of the best."""

    def score(trial: Trial) -> float:
        return trial.aligned * trial.clean if trial.clean >= CLEAN else -1.0

    seen: list[Trial] = []
    for _ in range(steps):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        pair = list(measure([left, right]))
        seen += pair
        if score(pair[0]) < score(pair[1]):
            low = left
        else:
            high = right
    centre = max(seen, key=score).strength
    seen += measure([centre - 30 + 6 * i for i in range(11)])
    return max(seen, key=score)
