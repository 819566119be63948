"""Rewards of responses by functions, models and adapters, with trl's signature of a function.

f(prompts, completions, completion_ids, **columns, trainer_state, log_metric, log_extra)
    -> a number for each response, or None where the function has no opinion
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.extras import require
from gemma_ext.nn.ppo import Sequences


@dataclass
class Responses:
    """What rewards are given for.

    Attributes:
        prompts: texts or messages; completions: alike; completion_ids: tokens, the end included.
        columns: of the dataset, a list for each.
        sequences: the same as tensors.
        state: `global_step` and `max_steps` of the run.
    """

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: Mapping[str, list[Any]]
    sequences: Sequences
    state: Any = None
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


class Rewards:
    """A weighted sum of reward functions.

    Args:
        functions: one or several of: a function, sync or async; an `nn.Module` whose output has
            `.logits` [B, 1]; an object with `score_sequences(sequences) -> [B]`; a text for
            `load_reward`.
        weights: one for each; all 1 by default.
        tokenizers: of the modules, one for each function or None; needed for modules.

    Raises:
        ValueError, TypeError: functions, weights and tokenizers that do not fit.
    """

    def __init__(
        self,
        functions: Any,
        weights: Sequence[float] | None = None,
        tokenizers: Any = None,
        device: torch.device | str = "cpu",
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
        self.functions = [f for f, _ in pairs]
        self.tokenizers = [t for _, t in pairs]
        self.names = _names(several)
        for name, function, tokenizer in zip(
            self.names, self.functions, self.tokenizers, strict=True
        ):
            if isinstance(function, nn.Module):
                function.eval()
                if tokenizer is None and not hasattr(function, "score_sequences"):
                    raise TypeError(
                        f"rewards: expected a tokenizer for the module {name}, got none"
                    )
            elif not callable(function) and not hasattr(function, "score_sequences"):
                raise TypeError(
                    f"rewards: expected a function, module, id or path, got "
                    f"{type(function).__name__}"
                )

    def __call__(self, responses: Responses) -> tuple[Tensor, dict[str, Tensor]]:
        """float32 [B] sums on the device of the sequences, nan where no function had an opinion;
        and the rewards of each function by its name.

        Raises:
            ValueError: a function that returns another number of rewards.
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
            given = _score_texts(function, tokenizer, responses)
        else:
            arguments = _accepted(function, _arguments(responses))
            given = function(**arguments)
            if inspect.isawaitable(given):
                given = _finished(given)
        if not isinstance(given, Tensor):
            given = torch.tensor([float("nan") if r is None else float(r) for r in given])
        if given.shape != (len(responses.prompts),):
            raise ValueError(
                f"rewards: expected {len(responses.prompts)} numbers of {name}, one for each "
                f"response, got {list(given.shape)}"
            )
        return given.to(device, torch.float32)


def load_reward(source: str, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """A reward function and the tokenizer it needs, or None.

    Args:
        source: module:function, where the module is imported as from the working folder; else a
            folder or hub id of a sequence classification with one output.

    Raises:
        ValueError: there is no such module, function or folder, or one with several outputs.
    """
    module, colon, name = source.partition(":")
    if colon and not Path(source).exists():
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            return getattr(import_module(module), name), None
        except ModuleNotFoundError as error:
            raise ValueError(f"reward: expected a module {module}, got {error}") from None
        except AttributeError:
            raise ValueError(f"reward: expected {name} in {module}, got none") from None
    require("a reward model", "hf", "transformers", "safetensors")
    import transformers

    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"reward: expected module:function, a folder or a hub id, got {source}: {first}"
        ) from None
    if model.config.num_labels != 1:
        raise ValueError(f"reward: expected one output of {source}, got {model.config.num_labels}")
    return model.to(device), tokenizer


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


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    taken = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in taken):
        return arguments
    names = {p.name for p in taken}
    return {name: value for name, value in arguments.items() if name in names}


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


def _score_texts(module: nn.Module, tokenizer: Any, responses: Responses) -> Tensor:
    """Of whole conversations, as the module's own tokenizer has them."""
    texts = [
        prompt + completion
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        for prompt, completion in zip(responses.prompts, responses.completions, strict=True)
    ]
    inputs = tokenizer(
        text=texts,
        return_tensors="pt",
        padding=True,
        padding_side="right",
        add_special_tokens=isinstance(responses.prompts[0], str),
    )
    device = next(module.parameters()).device
    return module(**{name: value.to(device) for name, value in inputs.items()}).logits[:, 0]
