"""What a language model is here: text in, text or natural-log probabilities out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol, runtime_checkable

Prompt = str | Sequence[Mapping[str, str]]
"""Text, or the messages of a chat: {"role": ..., "content": ...} each."""

NORMALISATIONS = (None, "tokens", "characters", "bytes")


@dataclass(frozen=True)
class Sampling:
    """How a completion is drawn.

    Attributes:
        max_tokens: of the completion, at least 1.
        temperature: 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens; 0 for all.
        top_p: draw from the likeliest tokens whose probabilities reach p, in (0, 1].
        stop: strings that end a completion and are not part of it.
        seed: a draw is a function of the seed, the prompt and how often the same call has had that
            prompt before, whatever else is in the call.

    Raises:
        TypeError, ValueError: a value that does not fit.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"expected {name} to be an int, got {value!r}")
            if value < least:
                raise ValueError(f"expected {name} to be at least {least}, got {value}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"expected {name} to be a number, got {value!r}")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"expected temperature to be 0 or more, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"expected top_p in (0, 1], got {self.top_p}")
        if isinstance(self.stop, str):
            raise TypeError(f"expected stop to be a sequence of strings, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"expected stop to hold strings that are not empty, got {self.stop!r}")


@dataclass(frozen=True)
class Completion:
    """What a model wrote.

    Attributes:
        text: without the stop string.
        tokens: how many were drawn, the end-of-text token not counted.
        finished: whether it ended by itself or at a stop string, not at `max_tokens`.
    """

    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Score:
    """The probability of a continuation.

    Attributes:
        token_logprobs: natural logarithms, one for each token of the continuation.
        greedy: whether every token is the likeliest one; None if the model does not tell.
    """

    token_logprobs: tuple[float, ...]
    greedy: bool | None

    @property
    def logprob(self) -> float:
        """Of the whole continuation; 0 for an empty one."""
        return math.fsum(self.token_logprobs)


@dataclass(frozen=True)
class Choice:
    """The options of a prompt and their scores, in the order they were given."""

    options: tuple[str, ...]
    scores: tuple[Score, ...]

    def values(self, normalise: str | None = None) -> tuple[float, ...]:
        """Log-probability of each option, divided by its length.

        Args:
            normalise: None to divide by nothing, or the unit of length: "tokens", "characters" (as
                the `acc_norm` of lm-eval) or "bytes" (UTF-8).

        Raises:
            ValueError: an unknown unit, or an option whose length is 0.
        """
        return tuple(
            score.logprob / _length(option, score, normalise)
            for option, score in zip(self.options, self.scores, strict=True)
        )

    def best(self, normalise: str | None = None) -> int:
        """Index of the option with the largest value, the first of equal ones."""
        values = self.values(normalise)
        return values.index(max(values))

    def probabilities(self, normalise: str | None = None) -> tuple[float, ...]:
        """Softmax of the values: shares of the options that sum to 1."""
        values = self.values(normalise)
        top = max(values)
        weights = [math.exp(value - top) if value > -math.inf else 0.0 for value in values]
        total = math.fsum(weights)
        return tuple(weight / total for weight in weights)


def _length(option: str, score: Score, unit: str | None) -> int:
    if unit not in NORMALISATIONS:
        raise ValueError(f"expected normalise to be one of {NORMALISATIONS}, got {unit!r}")
    if unit is None:
        return 1
    lengths = {
        "tokens": len(score.token_logprobs),
        "characters": len(option),
        "bytes": len(option.encode("utf-8", "surrogatepass")),
    }
    if lengths[unit] == 0:
        raise ValueError(f"expected options with {unit} to normalise by, got {option!r}")
    return lengths[unit]


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text; the sum of two is that of both texts.

    Attributes:
        logprob: natural logarithm of the probability of all tokens.
        tokens, words, bytes: lengths of the text; words lie between white space.
    """

    logprob: float
    tokens: int
    words: int
    bytes: int

    def __add__(self, other: Perplexity) -> Perplexity:
        return Perplexity(
            self.logprob + other.logprob,
            self.tokens + other.tokens,
            self.words + other.words,
            self.bytes + other.bytes,
        )

    @property
    def per_token(self) -> float:
        return self._per(self.tokens)

    @property
    def per_word(self) -> float:
        return self._per(self.words)

    @property
    def per_byte(self) -> float:
        return self._per(self.bytes)

    @property
    def bits_per_byte(self) -> float:
        return math.log2(self.per_byte)

    def _per(self, length: int) -> float:
        """exp(-logprob / length); NaN for an empty text."""
        return math.exp(-self.logprob / length) if length else math.nan


@runtime_checkable
class LanguageModel(Protocol):
    """What every paper takes as its model.

    All methods take sequences and answer in their order. Equal requests of a call are computed
    once, except that a repeated prompt draws a completion of its own.
    """

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = ...) -> list[Completion]:
        """One completion of each prompt."""
        ...

    def logprobs(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[Score]:
        """log P(continuation | prompt) of each pair."""
        ...

    def choices(
        self, prompts: Sequence[Prompt], options: Sequence[str] | Sequence[Sequence[str]]
    ) -> list[Choice]:
        """The scores of each prompt's options; one list of strings serves all prompts."""
        ...

    def perplexity(self, texts: Sequence[str]) -> list[Perplexity]:
        """log P(text), from nothing before it, of each text."""
        ...
