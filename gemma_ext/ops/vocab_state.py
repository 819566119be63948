"""What a `VocabState` was, for one release: accepted, ignored, warned about."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


def warn_ignored(name: str) -> None:
    """Say that an argument of the former filter does nothing."""
    warnings.warn(
        f"{name} is ignored and will be removed: the gradient filter needs no state",
        FutureWarning,
    )


class VocabState(nn.Module):
    """Nothing: the gradient filter samples without bias and learns nothing between calls."""

    def __init__(self, vocab_size: int | None = None, **_: Any) -> None:
        super().__init__()
        warn_ignored("VocabState")
