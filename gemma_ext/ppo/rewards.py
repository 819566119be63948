"""Rewards of responses by functions, models and adapters, with trl's signature of a function.

f(prompts, completions, completion_ids, **columns, trainer_state, log_metric, log_extra)
    -> a number for each response, or None where the function has no opinion
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.ppo.responses import Responses
from gemma_ext.ppo.reward_models import load_reward, padded_alike, score_texts


class Rewards:
    """A weighted sum of reward functions.

    Args:
        functions: one or several of: a function, sync or async; an `nn.Module` whose output has
            `.logits` [B, 1]; an object with `score_sequences(sequences) -> [B]`; a text for
            `load_reward`.
        weights: one for each; all 1 by default.
        tokenizers: of the modules, one for each function or None; needed for modules.
        batch: texts that a module reads at once.

    Raises:
        ValueError, TypeError: functions, weights and tokenizers that do not fit.
    """

    def __init__(
        self,
        functions: Any,
        weights: Sequence[float] | None = None,
        tokenizers: Any = None,
        device: torch.device | str = "cpu",
        batch: int = 64,
    ) -> None:
        several = list(functions) if isinstance(functions, (list, tuple)) else [functions]
        beside = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers]
        beside = beside * len(several) if len(beside) == 1 else beside
        self.weights = [1.0] * len(several) if weights is None else [float(w) for w in weights]
        if not several or not len(several) == len(self.weights) == len(beside):
            raise ValueError(
                f"rewards: expected as many weights and tokenizers as functions, got "
                f"{len(several)}, {len(self.weights)} and {len(beside)}"
            )
        pairs = [
            load_reward(f, device) if isinstance(f, str) else (f, t)
            for f, t in zip(several, beside, strict=True)
        ]
        self.batch = batch
        self.functions = [f for f, _ in pairs]
        self.tokenizers = [t for _, t in pairs]
        self.names = _names(several)
        for name, function, tokenizer in zip(
            self.names, self.functions, self.tokenizers, strict=True
        ):
            if isinstance(function, nn.Module):
                function.eval()
                if hasattr(function, "score_sequences"):
                    continue
                if tokenizer is None:
                    raise TypeError(
                        f"rewards: expected a tokenizer for the module {name}, got none"
                    )
                padded_alike(function, tokenizer)
            elif not callable(function) and not hasattr(function, "score_sequences"):
                raise TypeError(
                    f"rewards: expected a function, module, id or path, got "
                    f"{type(function).__name__}"
                )

    def __call__(self, responses: Responses) -> tuple[Tensor, dict[str, Tensor]]:
        """float32 [B] sums on the device of the sequences, nan where no function had an opinion;
        and the rewards of each function by its name.

        Raises:
            ValueError: a function that returns no numbers or another number of them, or asks for a
            column that is not there.
        """
        found = {
            name: self._one(name, function, tokenizer, responses)
            for name, function, tokenizer in zip(
                self.names, self.functions, self.tokenizers, strict=True
            )
        }
        table = torch.stack(list(found.values()), 1)
        weights = table.new_tensor(self.weights)
        total = (table * weights).nansum(1)
        return total.masked_fill(table.isnan().all(1), float("nan")), found

    def state_dict(self) -> dict[str, Any]:
        """Of the functions that have one and are no frozen modules."""
        return {name: function.state_dict() for name, function in self._with_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, function in self._with_state():
            if name in state:
                function.load_state_dict(state[name])

    def mode(self, training: bool) -> None:
        """Whether shapers that remember what they saw go on learning."""
        for _, function in self._with_state():
            if not training and hasattr(function, "eval"):
                function.eval()
            elif hasattr(function, "train"):
                function.train(*([] if training else [False]))

    def _with_state(self) -> list[tuple[str, Any]]:
        return [
            (name, function)
            for name, function in zip(self.names, self.functions, strict=True)
            if hasattr(function, "state_dict") and not isinstance(function, nn.Module)
        ]

    @torch.no_grad()
    def _one(self, name: str, function: Any, tokenizer: Any, responses: Responses) -> Tensor:
        device = responses.sequences.ids.device
        if hasattr(function, "score_sequences"):
            given = function.score_sequences(responses.sequences)
        elif isinstance(function, nn.Module):
            given = score_texts(function, tokenizer, responses, self.batch)
        else:
            arguments = accepted(name, function, _arguments(responses))
            given = function(**arguments)
            if inspect.isawaitable(given):
                given = _finished(given)
        if not isinstance(given, Tensor):
            given = torch.tensor(_numbers(name, given))
        if given.shape != (len(responses.prompts),):
            raise ValueError(
                f"rewards: expected {len(responses.prompts)} numbers of {name}, one for each "
                f"response, got {list(given.shape)}"
            )
        return given.to(device, torch.float32)


def _names(functions: Sequence[Any]) -> list[str]:
    names: list[str] = []
    for function in functions:
        if isinstance(function, str):
            name = function.rstrip("/").rpartition("/")[2].rpartition(":")[2]
        else:
            function = function.func if isinstance(function, partial) else function
            name = getattr(function, "__name__", type(function).__name__)
        taken = sum(other.partition("#")[0] == name for other in names)
        names.append(f"{name}#{taken + 1}" if taken else name)
    return names


def _arguments(responses: Responses) -> dict[str, Any]:
    def log_metric(name: str, value: float) -> None:
        responses.metrics.setdefault(name, []).append(float(value))

    def log_extra(column: str, values: list[Any]) -> None:
        responses.extra[column] = list(values)

    return {
        **responses.columns,
        "prompts": responses.prompts,
        "completions": responses.completions,
        "completion_ids": responses.completion_ids,
        "trainer_state": responses.state,
        "log_metric": log_metric,
        "log_extra": log_extra,
    }


def accepted(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes: all, or those that it names.

    Raises:
        ValueError: it asks for one that is not there.
    """
    taken = inspect.signature(function).parameters.values()
    for wanted in taken:
        named = wanted.kind in (wanted.POSITIONAL_OR_KEYWORD, wanted.KEYWORD_ONLY)
        if named and wanted.default is wanted.empty and wanted.name not in arguments:
            raise ValueError(
                f"rewards: expected the prompts to have the column {wanted.name}, which {name} "
                f"asks for, got {', '.join(arguments)}"
            )
    if any(p.kind is p.VAR_KEYWORD for p in taken):
        return arguments
    names = {p.name for p in taken}
    return {key: value for key, value in arguments.items() if key in names}


def _numbers(name: str, given: Any) -> list[float]:
    """What a function returned, nan for None."""
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise ValueError(f"rewards: expected a list of numbers of {name}, got {given!r:.60}")
    found = []
    for place, value in enumerate(given):
        try:
            if isinstance(value, str):  # float would read "1"
                raise TypeError
            found.append(float("nan") if value is None else float(value))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"rewards: expected numbers or None of {name}, got {value!r:.60} for response "
                f"{place}"
            ) from None
    return found


def _finished(given: Any) -> Any:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_awaited(given))
    # a notebook's loop is running in this thread, and cannot be entered again
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _awaited(given)).result()


async def _awaited(given: Any) -> Any:
    return await given
