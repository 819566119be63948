"""When a threshold finds the support, and what share of a dictionary is certain to be unique.

feasible   delta_min > eps (2 K - 1) delta_max
threshold  eps K delta_max < tau < delta_min - eps (K - 1) delta_max
q*         sup { q : mu_q < 1 / (2 K_q - 1) }
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gemma_ext.papers.atoms.coherence import Coherence


@dataclass(frozen=True)
class Window:
    """Thresholds that find every support of K atoms with codes in [delta_min, delta_max].

    Attributes:
        low, high: exclusive bounds; the window is empty where low >= high.
        error: a code read off without a refit is wrong by at most this.
    """

    low: float
    high: float
    error: float

    @property
    def feasible(self) -> bool:
        return self.low < self.high

    @property
    def middle(self) -> float:
        """The threshold furthest from both bounds.

        Raises:
            ValueError: the window is empty.
        """
        if not self.feasible:
            raise ValueError(
                f"window: expected low < high, got low {self.low:.4g}, high {self.high:.4g}: "
                "no threshold is sure to find these supports"
            )
        return 0.5 * (self.low + self.high)


def window(epsilon: float, k: int, smallest: float, largest: float) -> Window:
    """The window of the paper.

    Args:
        epsilon: bound of |<d_i, d_j>_S|, for atoms of equal norm under S.
        k: active atoms.
        smallest, largest: of the codes of active atoms.

    Raises:
        ValueError: k < 1, or not 0 < smallest <= largest.
    """
    if k < 1:
        raise ValueError(f"k: expected 1 or more, got {k}")
    if not 0 < smallest <= largest:
        raise ValueError(f"smallest: expected above 0 and at most {largest}, got {smallest}")
    crosstalk = epsilon * (k - 1) * largest
    return Window(epsilon * k * largest, smallest - crosstalk, crosstalk)


def uniqueness_bound(k: int) -> float:
    """1 / (2 K - 1): below this coherence a K-sparse code is the only one."""
    return 1.0 / (2 * k - 1) if k > 0 else float("inf")


def stability(found: Coherence, active: Tensor) -> float:
    """q* of the paper: over pairs i < j and over tokens.

    K_q is a step function of q, so that the supremum is found by going through its steps.

    Args:
        found: distribution of |<d_i, d_j>_S|.
        active: [K_max + 1] how many tokens have 0, 1, ... active atoms.

    Returns:
        A number in [0, 1]; a pair in the bin that the bound falls into counts as above it.

    Raises:
        ValueError: no tokens.
    """
    total = int(active.sum())
    if total == 0:
        raise ValueError("active: expected counts of at least one token, got none")
    low = 0.0
    for k, tokens in enumerate(active.tolist()):
        if tokens == 0:
            continue
        high = low + tokens / total
        share = found.share_below(uniqueness_bound(k))
        if share < high:
            return max(low, share)
        low = high
    return 1.0
