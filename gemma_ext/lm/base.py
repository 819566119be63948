"""Checks and the part of the protocol that all backends share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from gemma_ext.lm.protocol import Choice, Completion, Perplexity, Prompt, Sampling, Score


class Base(ABC):
    """Checks arguments, flattens choices into pairs and numbers repeated prompts.

    Raises:
        TypeError, ValueError: from every method, for an argument that does not fit.
    """

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),  # noqa: B008
    ) -> list[Completion]:
        prompts = _prompts(prompts)
        if not isinstance(sampling, Sampling):
            raise TypeError(f"expected sampling to be a Sampling, got {type(sampling).__name__}")
        texts = [prompt if isinstance(prompt, str) else repr(prompt) for prompt in prompts]
        return self._complete(prompts, repetitions(texts, sampling), sampling)

    def logprobs(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[Score]:
        prompts, continuations = _prompts(prompts), _texts("continuations", continuations)
        if len(prompts) != len(continuations):
            raise ValueError(
                f"expected a continuation for each of {len(prompts)} prompts, "
                f"got {len(continuations)}"
            )
        return self._score(list(zip(prompts, continuations, strict=True)))

    def choices(
        self, prompts: Sequence[Prompt], options: Sequence[str] | Sequence[Sequence[str]]
    ) -> list[Choice]:
        prompts = _prompts(prompts)
        offered = _options(options, len(prompts))
        pairs = [(p, o) for p, some in zip(prompts, offered, strict=True) for o in some]
        scores = iter(self._score(pairs))
        return [Choice(some, tuple(next(scores) for _ in some)) for some in offered]

    def perplexity(self, texts: Sequence[str]) -> list[Perplexity]:
        return self._perplexity(_texts("texts", texts))

    @abstractmethod
    def _complete(
        self, prompts: list[Prompt], repetitions: list[int], sampling: Sampling
    ) -> list[Completion]:
        """A completion of each prompt; `repetitions` tells equal prompts apart."""

    @abstractmethod
    def _score(self, pairs: list[tuple[Prompt, str]]) -> list[Score]: ...

    @abstractmethod
    def _perplexity(self, texts: list[str]) -> list[Perplexity]: ...


def lengths(text: str) -> tuple[int, int]:
    """Words and bytes of a text."""
    return len(text.split()), len(text.encode("utf-8", "surrogatepass"))


def repetitions(prompts: Sequence[Hashable], sampling: Sampling) -> list[int]:
    """How often each prompt came before; 0 for all if nothing is drawn."""
    seen: Counter[Hashable] = Counter()
    counts = []
    for prompt in prompts:
        counts.append(seen[prompt] if sampling.temperature else 0)
        seen[prompt] += 1
    return counts


def _prompts(values: Any) -> list[Prompt]:
    return [_prompt(value, place) for place, value in enumerate(_sequence("prompts", values))]


def _prompt(value: Any, place: int) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and all(_is_message(item) for item in value):
        return [{"role": item["role"], "content": item["content"]} for item in value]
    raise TypeError(
        f"expected prompts[{place}] to be a string or a list of messages with the strings "
        f"'role' and 'content', got {value!r:.80}"
    )


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and all(
        isinstance(item.get(key), str) for key in ("role", "content")
    )


def _options(values: Any, count: int) -> list[tuple[str, ...]]:
    values = _sequence("options", values)
    if values and all(isinstance(value, str) for value in values):
        return [tuple(values)] * count
    if len(values) != count:
        raise ValueError(f"expected options for each of {count} prompts, got {len(values)}")
    offered = [tuple(_texts(f"options[{place}]", some)) for place, some in enumerate(values)]
    for place, some in enumerate(offered):
        if not some:
            raise ValueError(f"expected options[{place}] to hold an option, got none")
    return offered


def _texts(name: str, values: Any) -> list[str]:
    values = _sequence(name, values)
    for place, value in enumerate(values):
        if not isinstance(value, str):
            kind = type(value).__name__
            raise TypeError(f"expected {name}[{place}] to be a string, got {kind}")
    return values


def _sequence(name: str, values: Any) -> list[Any]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"expected {name} to be a sequence of them, got {type(values).__name__}")
    return list(values)
