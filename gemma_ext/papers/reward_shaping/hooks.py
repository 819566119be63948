"""Shaped rewards where TRL and `gemma_ext.ppo` ask for rewards."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gemma_ext.papers.reward_shaping.monitors import HackingMonitor
from gemma_ext.papers.reward_shaping.shaper import RewardShaper
from gemma_ext.papers.reward_shaping.shaping import Shaping
from gemma_ext.ppo.rewards import accepted

COLUMN = "ref_rewards"
Scores = Sequence[float | None] | Tensor


class RewardFunction(Protocol):
    """TRL's: one score a completion, None for one that it does not judge."""

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> Scores: ...


def shape(
    reward: RewardFunction,
    shaper: RewardShaper | Shaping | str,
    *,
    column: str = COLUMN,
    name: str | None = None,
    monitor: HackingMonitor | None = None,
) -> ShapedReward:
    """A reward function that returns the shaped scores of another.

    In a list of several reward functions each is shaped by its own, before TRL weighs them.

    Args:
        reward: of TRL's signature, sync or async; without `**kwargs` it gets what it names.
        shaper: or the rules, or the name of one.
        column: of the data set, with the scores of the reference responses of each row.
        name: in logs; the reward's own by default.
        monitor: is told every batch; its metrics are logged too.

    Raises:
        TypeError: a module, which needs a tokenizer: `RewardModel`.

    Example:
        >>> GRPOTrainer(model, shape(score, "par"), GRPOConfig(scale_rewards="none"), data)
    """
    if isinstance(reward, nn.Module) or not callable(reward):
        raise TypeError(
            f"reward: expected a function, got {type(reward).__name__}; a model becomes one by "
            "RewardModel(model, tokenizer)"
        )
    if not isinstance(shaper, RewardShaper):
        shaper = RewardShaper(shaper)
    called = reward if inspect.isroutine(reward) else reward.__call__
    kind = _AsyncShapedReward if inspect.iscoroutinefunction(called) else ShapedReward
    return kind(reward, shaper, column, name or _name(reward), monitor)


class ShapedReward:
    """What `shape` gives: a reward function with the state of its shaper.

    Attributes:
        reward, shaper, column, monitor: as given.
        __name__: what TRL logs it as.
    """

    def __init__(
        self,
        reward: RewardFunction,
        shaper: RewardShaper,
        column: str,
        name: str,
        monitor: HackingMonitor | None,
    ) -> None:
        self.reward, self.shaper, self.column, self.monitor = reward, shaper, column, monitor
        self.__name__ = name
        self._model: nn.Module | None = None

    def follow(self, model: nn.Module) -> ShapedReward:
        """Evaluates while `model` does: TRL tells its rewards no other way."""
        self._model = model
        return self

    def train(self, mode: bool = True) -> ShapedReward:
        self.shaper.train(mode)
        return self

    def eval(self) -> ShapedReward:
        return self.train(False)

    def state_dict(self) -> dict[str, Any]:
        inner = getattr(self.reward, "state_dict", None)
        state = {"shaper": self.shaper.state_dict(), "reward": inner() if inner else None}
        return {**state, "monitor": self.monitor.state_dict() if self.monitor else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shaper.load_state_dict(state["shaper"])
        if state["reward"] is not None:
            self.reward.load_state_dict(state["reward"])
        if self.monitor is not None and state["monitor"] is not None:
            self.monitor.load_state_dict(state["monitor"])

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        raw = self._asked(prompts, completions, completion_ids, columns)
        return self._shaped(raw, completion_ids, columns)

    def _asked(self, prompts: Any, completions: Any, ids: Any, columns: dict[str, Any]) -> Any:
        given = {"prompts": prompts, "completions": completions, "completion_ids": ids, **columns}
        return self.reward(**accepted(_name(self.reward), self.reward, given))

    def _shaped(
        self, raw: Scores, completion_ids: Sequence[Sequence[int]] | None, columns: dict[str, Any]
    ) -> list[float | None]:
        if self._model is not None:
            self.train(self._model.training)
        values = raw.tolist() if isinstance(raw, Tensor) else list(raw)
        rows = [at for at, value in enumerate(values) if value is not None]
        # a tensor keeps its dtype; numbers of Python become float32
        scores = raw if isinstance(raw, Tensor) else torch.tensor([float(values[r]) for r in rows])
        for row in rows:
            if not math.isfinite(values[row]):
                raise ValueError(
                    f"{self.__name__}: expected finite scores, got {values[row]} in row {row}"
                )
        references = lengths = None
        if self.shaper.shaping.needs_references or (self.monitor and self.column in columns):
            if columns.get(self.column) is None:
                raise ValueError(
                    f"{self.column}: expected a column of reference scores, got columns "
                    f"{sorted(columns)}"
                )
            references = [columns[self.column][row] for row in rows]
        if completion_ids is not None:
            lengths = [len(completion_ids[row]) for row in rows]
        shaped = self.shaper(scores, references, lengths=lengths)
        metrics = {}
        if rows:
            metrics = {"raw": float(scores.double().mean()), "shaped": float(shaped.mean())}
        if self.monitor is not None and self.shaper.training:
            metrics |= self.monitor.update(scores, shaped, references, lengths)
        if log := columns.get("log_metric"):
            for key, value in metrics.items():
                log(f"{self.__name__}/{key}", value)
        found: list[float | None] = [None] * len(values)
        for row, value in zip(rows, shaped.tolist(), strict=True):
            found[row] = value
        return found


class _AsyncShapedReward(ShapedReward):
    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        pending: Awaitable[Scores] = self._asked(prompts, completions, completion_ids, columns)
        return self._shaped(await pending, completion_ids, columns)


def _name(reward: Any) -> str:
    return getattr(reward, "__name__", type(reward).__name__)
