"""How sure a share is."""

from __future__ import annotations

import math

_Z = 1.959963984540054  # of 95 %


def wilson(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score); (0, 1) of nothing.

    Raises:
        ValueError: a count outside [0, total].
    """
    if not 0 <= count <= total:
        raise ValueError(f"expected a count between 0 and {total}, got {count}")
    if total == 0:
        return 0.0, 1.0
    share, z2 = count / total, _Z**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, middle - half), min(1.0, middle + half)
