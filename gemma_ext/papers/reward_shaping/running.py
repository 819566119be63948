"""Count, mean, sum of squared deviations and range of a stream, in float64, over all ranks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MOMENTS = ("count", "mean", "squares", "low", "high")


@dataclass(frozen=True)
class Running:
    """Of the values seen so far.

    Attributes:
        squares: sum of squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    @classmethod
    def of(cls, values: Tensor) -> Running:
        """Of one batch [B]; moments are taken in the dtype of the values."""
        if not len(values):
            return cls()
        mean = values.mean()
        squares = ((values - mean) ** 2).sum()
        low, high = values.aminmax()
        return cls(len(values), *(float(x) for x in (mean, squares, low, high)))

    @property
    def std(self) -> float:
        """Of the population, as the study has it; 0 of no or one value."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def merged(self, other: Running) -> Running:
        """Of both streams: mean = mean_a + d n_b / n, squares = a + b + d^2 n_a n_b / n."""
        count = self.count + other.count
        if not other.count or not self.count:
            return self if not other.count else other
        delta = other.mean - self.mean
        return Running(
            count,
            self.mean + delta * other.count / count,
            self.squares + other.squares + delta**2 * self.count * other.count / count,
            min(self.low, other.low),
            max(self.high, other.high),
        )

    def gathered(self, group: ProcessGroup | None) -> Running:
        """Of this batch on all ranks of the group, the same on each; this one without torch's
        process groups. Every rank has to call it, also one with no values."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return self
        parts: list[Running] = [self] * dist.get_world_size(group)
        dist.all_gather_object(parts, self, group=group)
        found = Running()
        for part in parts:
            found = found.merged(part)
        return found

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, float]) -> Running:
        """Raises a ValueError where a moment is missing."""
        missing = [name for name in _MOMENTS if name not in state]
        if missing:
            raise ValueError(f"state: expected {', '.join(_MOMENTS)}, got no {missing[0]}")
        return cls(**{name: state[name] for name in _MOMENTS})
