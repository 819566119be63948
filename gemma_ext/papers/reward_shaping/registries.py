"""Shaped rewards where verl and OpenRLHF ask for rewards: files with a function of a known name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gemma_ext.papers.reward_shaping.hooks import COLUMN, Scores
from gemma_ext.papers.reward_shaping.shaper import RewardShaper
from gemma_ext.papers.reward_shaping.shaping import Shaping


def for_verl(
    reward: Callable[..., float | Mapping[str, float]],
    shaper: RewardShaper | Shaping | str,
    *,
    column: str = COLUMN,
    lengths: Callable[[str], int] | None = None,
) -> Callable[..., dict[str, float]]:
    """A function for verl's `custom_reward_function.{path,name}`.

    Args:
        reward: (data_source, solution_str, ground_truth, extra_info) to a score, or to a mapping
            with "score".
        column: of `extra_info`, with the scores of the reference responses.
        lengths: tokens of a solution; for the length penalty.

    Returns:
        Of the same signature; gives {"score": shaped, "raw": score}.

    Raises:
        ValueError: a rule with statistics: verl scores one solution at a time, in many processes.
    """
    shaper = _stateless(shaper, "verl")

    def compute_score(
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, float]:
        raw = reward(data_source, solution_str, ground_truth, extra_info, **more)
        raw = float(raw["score"] if isinstance(raw, Mapping) else raw)
        references = _found(extra_info or {}, column, "extra_info", shaper)
        count = None if lengths is None else [lengths(solution_str)]
        rows = None if references is None else [references]
        shaped = shaper(torch.tensor([raw]), rows, lengths=count)
        return {"score": float(shaped[0]), "raw": raw}

    return compute_score


def for_openrlhf(
    reward: Callable[..., Scores],
    shaper: RewardShaper | Shaping | str,
    *,
    column: str = COLUMN,
    lengths: Callable[[str], int] | None = None,
) -> Callable[..., dict[str, Any]]:
    """A `reward_func` for the file that OpenRLHF's `--reward.remote_url` names.

    Args:
        reward: (queries, prompts, labels) to scores [B]; a query is prompt and response.
        column: of a label that is a mapping, or the JSON of one; a label may also be the list of
            the reference scores itself.
        lengths: tokens of a response; for the length penalty.
    """
    shaper = _stateless(shaper, "OpenRLHF")

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **more: Any
    ) -> dict[str, Any]:
        raw = torch.as_tensor(reward(queries, prompts, labels, **more))
        references = None
        if shaper.shaping.needs_references:
            references = [_found(_label(x, column), column, "labels", shaper) for x in labels]
        count = None
        if lengths is not None:
            pairs = zip(queries, prompts, strict=True)
            count = [lengths(query.removeprefix(prompt)) for query, prompt in pairs]
        shaped = shaper(raw, references, lengths=count)
        return {"rewards": shaped, "scores": shaped, "extra_logs": {"raw_reward": raw}}

    return reward_func


def _stateless(shaper: RewardShaper | Shaping | str, system: str) -> RewardShaper:
    if not isinstance(shaper, RewardShaper):
        shaper = RewardShaper(shaper)
    if shaper.shaping.running:
        raise ValueError(
            f"shaper: expected no running statistics for {system}, which scores in several "
            f"processes, got {', '.join(shaper.shaping.running)}"
        )
    return shaper


def _found(
    where: Mapping[str, Any], column: str, what: str, shaper: RewardShaper
) -> Sequence[float] | None:
    if not shaper.shaping.needs_references:
        return None
    if column not in where:
        raise ValueError(f"{what}: expected {column!r} in it, got {sorted(where)}")
    return where[column]


def _label(label: Any, column: str) -> Mapping[str, Any]:
    if isinstance(label, str):
        try:
            label = json.loads(label)
        except json.JSONDecodeError:
            return {}
    if isinstance(label, Mapping):
        return label
    return {column: label} if isinstance(label, Sequence) else {}
