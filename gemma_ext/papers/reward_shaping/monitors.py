"""What shows that a policy has begun to exploit its reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_ext.ppo.ranks import gathered

ALARM = 3.0  # of the centred reward; separates the study's runs, for its reward model only
SATURATION = 0.95


class HackingMonitor:
    """Metrics of every batch, and alarms.

    Rewards are centred on the reference scores where there are any, else on the mean of the first
    batch.

    Args:
        alarm: mean centred reward above which a run is suspect: in the study every run that ended
            about 3 above its start had lost, for that reward model.
        saturation: a centred reward whose sigmoid is above it counts as saturated.
        stop_at: share of saturated rewards at which `stop` is set, None for never.

    Attributes:
        history: the metrics of every batch: "centred", "saturated", and "length_drift", "kl",
            "disagreement" where they are known.
        alarms: sentences, in the order they were raised, each kind once.
        stop: whether the run should end.
    """

    def __init__(
        self,
        *,
        alarm: float = ALARM,
        saturation: float = SATURATION,
        stop_at: float | None = None,
    ) -> None:
        if not 0 < saturation < 1:
            raise ValueError(f"saturation: expected a share in (0, 1), got {saturation}")
        self.alarm, self.saturation, self.stop_at = alarm, saturation, stop_at
        self.history: list[dict[str, float]] = []
        self.alarms: list[str] = []
        self.stop = False
        self._start: float | None = None
        self._length: float | None = None

    def update(
        self,
        raw: Tensor,
        shaped: Tensor | None = None,
        references: Sequence[Sequence[float]] | Tensor | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        *,
        kl: float | None = None,
        members: Tensor | None = None,
    ) -> dict[str, float]:
        """The metrics of a batch.

        Args:
            raw: [B] scores of the reward model.
            shaped: [B], for its spread; a batch whose shaped rewards are all equal teaches nothing.
            references: scores of the reference responses of each row.
            lengths: [B] tokens of the responses; drift is against the first batch.
            kl: mean divergence from the reference policy, for the curve of proxy against KL.
            members: [K, B] scores of an ensemble; their standard deviation is the disagreement.

        Returns:
            Nothing for an empty batch.
        """
        r = raw.detach().double().cpu()
        if not len(r):
            return {}
        if references is not None:
            means = [
                float(torch.as_tensor(q).double().mean()) if len(q) else 0.0 for q in references
            ]
            offset = torch.tensor(means)
        else:
            self._start = float(r.mean()) if self._start is None else self._start
            offset = torch.tensor(self._start)
        above = r - offset.double()
        found = {
            "centred": float(above.mean()),
            "saturated": float((above.sigmoid() > self.saturation).double().mean()),
        }
        if shaped is not None:
            found["spread"] = float(shaped.detach().double().std(correction=0))
        if lengths is not None:
            mean = float(torch.as_tensor(lengths).double().mean())
            self._length = mean if self._length is None else self._length
            found["length_drift"] = mean / self._length - 1 if self._length else 0.0
        if kl is not None:
            found["kl"] = float(kl)
        if members is not None:
            found["disagreement"] = float(members.detach().double().std(0).mean())
        self.history.append(found)
        self._raise(found)
        return found

    def watch(self, trainer: Any, step: int, line: Mapping[str, float]) -> None:
        """A callback of `gemma_ext.ppo.PPOTrainer`: the step's divergence goes into the curve, and
        where any rank's monitor says `stop`, the run ends behind this step.

        A run that was ended and is called again goes on for one step and ends again.

        Example:
            >>> monitor = HackingMonitor(stop_at=0.5)
            >>> PPOTrainer(..., shape(reward, "par", monitor=monitor), callbacks=[monitor.watch])
        """
        if self.history:
            self.history[-1]["kl"] = float(line["objective/kl"])
        if any(gathered(self.stop)):
            trainer.steps = step

    def curve(self) -> tuple[list[float], list[float]]:
        """(KL, centred proxy reward) of the batches whose divergence is known."""
        known = [row for row in self.history if "kl" in row]
        return [row["kl"] for row in known], [row["centred"] for row in known]

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [dict(row) for row in self.history],
            "alarms": list(self.alarms),
            "stop": self.stop,
            "start": self._start,
            "length": self._length,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = [dict(row) for row in state["history"]]
        self.alarms, self.stop = list(state["alarms"]), bool(state["stop"])
        self._start, self._length = state["start"], state["length"]

    def _raise(self, found: dict[str, float]) -> None:
        step = len(self.history)
        if found["centred"] > self.alarm and not any("centred" in text for text in self.alarms):
            self.alarms.append(
                f"batch {step}: the mean centred reward is {found['centred']:.2f}, "
                f"above {self.alarm:g}"
            )
        if self.stop_at is not None and found["saturated"] >= self.stop_at and not self.stop:
            self.stop = True
            self.alarms.append(f"batch {step}: {found['saturated']:.0%} of rewards are saturated")
