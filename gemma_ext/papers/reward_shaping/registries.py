"""Shaped rewards where verl and OpenRLHF ask for rewards: files with a function of a known name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from gemma_ext.papers.reward_shaping.hooks import COLUMN, Scores
from gemma_ext.papers.reward_shaping.shaper import RewardShaper
from gemma_ext.papers.reward_shaping.shaping import Shaping


def for_verl(
    reward: Callable[..., Any],
    shaper: RewardShaper | Shaping | str,
    *,
    column: str = COLUMN,
    lengths: Callable[[str], int] | None = None,
    batch: bool = False,
) -> Callable[..., Any]:
    """A function for verl's `custom_reward_function.{path,name}`.

    Args:
        reward: (data_source, solution_str, ground_truth, extra_info) to a score, or to a mapping
            with "score"; sync or async. With `batch`, (data_sources, solution_strs, ground_truths,
            extra_infos) to a list of those, as verl's reward manager of that name calls it.
        column: of `extra_info`, with the scores of the reference responses.
        lengths: tokens of a solution; for the length penalty.

    Returns:
        Of the same signature; gives {"score": shaped, "raw": score} beside whatever else the
        mapping has. verl logs all of it.

    Raises:
        ValueError: a rule with statistics: verl scores in several processes. The function: no
            references in `extra_info`, another number of scores.
        TypeError: an async reward with `batch`, which verl does not wait for.
    """
    shaping = _Verl(_stateless(shaper, "verl"), column, lengths)
    called = reward if inspect.isroutine(reward) else reward.__call__
    waits = inspect.iscoroutinefunction(called)
    # verl calls by these names
    if batch:
        if waits:
            raise TypeError("reward: expected a plain function with batch, got an async one")

        def compute_scores(
            data_sources: Sequence[str],
            solution_strs: Sequence[str],
            ground_truths: Sequence[Any],
            extra_infos: Sequence[Mapping[str, Any] | None],
            **more: Any,
        ) -> list[dict[str, Any]]:
            raw = reward(data_sources, solution_strs, ground_truths, extra_infos, **more)
            return shaping(raw, solution_strs, extra_infos)

        return compute_scores
    if waits:

        async def wait_for_score(
            data_source: str,
            solution_str: str,
            ground_truth: Any,
            extra_info: Mapping[str, Any] | None = None,
            **more: Any,
        ) -> dict[str, Any]:
            raw = await reward(data_source, solution_str, ground_truth, extra_info, **more)
            return shaping([raw], [solution_str], [extra_info])[0]

        return wait_for_score

    def compute_score(
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        raw = reward(data_source, solution_str, ground_truth, extra_info, **more)
        return shaping([raw], [solution_str], [extra_info])[0]

    return compute_score


class _Verl(NamedTuple):
    """From what rewards give for some solutions to what verl takes."""

    shaper: RewardShaper
    column: str
    lengths: Callable[[str], int] | None

    def __call__(
        self,
        given: Sequence[Any],
        solutions: Sequence[str],
        infos: Sequence[Mapping[str, Any] | None],
    ) -> list[dict[str, Any]]:
        if len(given) != len(solutions):
            raise ValueError(f"reward: expected {len(solutions)} scores, got {len(given)}")
        told = [dict(one) if isinstance(one, Mapping) else {"score": one} for one in given]
        raw = [float(one["score"]) for one in told]
        references = counts = None
        if self.shaper.shaping.needs_references:
            references = [_found(x or {}, self.column, "extra_info") for x in infos]
        if self.lengths is not None:
            counts = [self.lengths(text) for text in solutions]
        shaped = self.shaper(torch.tensor(raw), references, lengths=counts).tolist()
        return [
            {**one, "score": score, "raw": before}
            for one, score, before in zip(told, shaped, raw, strict=True)
        ]


def for_openrlhf(
    reward: Callable[..., Scores | Mapping[str, Any]],
    shaper: RewardShaper | Shaping | str,
    *,
    column: str = COLUMN,
    lengths: Callable[[str], int] | None = None,
) -> Callable[..., dict[str, Any]]:
    """A `reward_func` for the file that OpenRLHF's `--reward.remote_url` names.

    OpenRLHF calls it for one response at a time, and where it raises goes on without a reward; the
    sentence of the error is in its log.

    Args:
        reward: (queries, prompts, labels) to scores [B], or to a mapping with those as "rewards"; a
            query is prompt and response, special tokens included.
        column: of a label that is a mapping, or the JSON of one; a label may also be the list of
            the reference scores itself.
        lengths: tokens of a response; for the length penalty.

    Returns:
        Of the same signature; gives "rewards" shaped, "scores", by which OpenRLHF filters prompts,
        as the reward has them or else shaped, and "extra_logs" with "raw_reward" among them.

    Raises:
        ValueError: a rule with statistics: OpenRLHF scores in several processes. The function: no
            references in a label, a query that does not begin with its prompt.
    """
    shaper = _stateless(shaper, "OpenRLHF")

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **more: Any
    ) -> dict[str, Any]:
        given = reward(queries, prompts, labels, **more)
        told = given if isinstance(given, Mapping) else {"rewards": given}
        raw = torch.as_tensor(told["rewards"])
        references = None
        if shaper.shaping.needs_references:
            references = [_found(_label(x, column), column, "labels") for x in labels]
        count = None
        if lengths is not None:
            count = [lengths(_response(*pair)) for pair in zip(queries, prompts, strict=True)]
        shaped = shaper(raw, references, lengths=count)
        logs = {**(told.get("extra_logs") or {}), "raw_reward": raw}
        return {"scores": shaped, **told, "rewards": shaped, "extra_logs": logs}

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


def _found(where: Mapping[str, Any], column: str, what: str) -> Sequence[float]:
    # None is what a table has where a row lacks the entry
    if where.get(column) is None:
        raise ValueError(f"{what}: expected {column!r} in it, got {sorted(where)}")
    return where[column]


def _response(query: str, prompt: str) -> str:
    if not query.startswith(prompt):
        raise ValueError(
            f"queries: expected a text that begins with its prompt, to count the tokens behind it, "
            f"got {query[:40]!r} for {prompt[:40]!r}"
        )
    return query[len(prompt) :]


def _label(label: Any, column: str) -> Mapping[str, Any]:
    if isinstance(label, str):
        try:
            label = json.loads(label)
        except json.JSONDecodeError:
            return {}
    if isinstance(label, Mapping):
        return label
    return {column: label} if isinstance(label, Sequence) else {}
