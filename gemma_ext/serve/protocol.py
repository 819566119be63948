"""What a server and an engine say to each other: requests in, one event per token out.

Every method of an engine is called from one thread. Tokens are ids of the model's vocabulary,
loops and exit depths are counted from 1, log-probabilities are natural.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, Protocol

from gemma_ext.serve.params import (
    GREEDY,
    MOST_COUNT,
    MOST_IDS,
    MOST_LOGPROBS,
    MOST_SEED,
    SamplingParams,
    check_value,
)

__all__ = [
    "GREEDY", "MOST_COUNT", "MOST_IDS", "MOST_LOGPROBS", "MOST_SEED", "Engine", "Event",
    "FinishReason", "Limits", "Request", "SamplingParams", "Stats", "Token",
]  # fmt: skip

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt and what to do with it.

    Attributes:
        prompt: token ids, at least one; nothing is added to them.
        params: how the output is drawn.
        choice: which of several outputs of one prompt this is; part of the key of its draws.
        prompt_logprobs: None, or n to score the prompt: the log-probability of each of its tokens
            after those before it, and the n likeliest tokens in its place, read after
            `params.max_loops` loops. Such a prompt is computed, not taken from a prefix cache.

    Raises:
        TypeError, ValueError: a value that does not fit; one sentence that begins with its name.
    """

    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    choice: int = 0
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))
        if not self.prompt:
            raise ValueError("prompt: expected at least one token, got none")
        if not all(type(token) is int and token >= 0 for token in self.prompt):
            raise TypeError("prompt: expected token ids, integers of at least 0")
        check_value("choice", self.choice, Integral, 0, MOST_COUNT)
        check_value("prompt_logprobs", self.prompt_logprobs, Integral, 0, MOST_LOGPROBS, True)

    def check(self, limits: Limits) -> None:
        """Raises a ValueError, one sentence, if no engine of these limits can answer this."""
        params = self.params
        named = (
            ("prompt", self.prompt),
            ("logit_bias", [token for token, _ in params.logit_bias]),
            ("stop_ids", params.stop_ids),
        )
        for name, tokens in named:
            if tokens and max(tokens) >= limits.vocabulary:
                raise ValueError(
                    f"{name}: expected tokens below the vocabulary of {limits.vocabulary}, "
                    f"got {max(tokens)}"
                )
        if len(self.prompt) + params.max_tokens > limits.max_model_len:
            raise ValueError(
                f"max_tokens: expected prompt and output of at most {limits.max_model_len} "
                f"tokens, got {len(self.prompt)} + {params.max_tokens}"
            )
        for name in ("min_loops", "max_loops"):
            value = getattr(params, name)
            if value is not None and value > limits.loops:
                raise ValueError(f"{name}: expected at most {limits.loops} loops, got {value}")


@dataclass(frozen=True)
class Limits:
    """What an engine can take.

    Attributes:
        vocabulary: V; token ids lie below it.
        loops: B of the model; 1 for a model without loops.
        max_model_len: tokens of prompt and output together, no more than the KV pool holds.
    """

    vocabulary: int
    loops: int
    max_model_len: int


@dataclass(frozen=True)
class Token:
    """A token and how likely it was.

    Attributes:
        id: of the token.
        logprob: of the token; None where it was not asked for.
        top: (id, log-probability) of the likeliest tokens, falling, lowest id first of equal ones.
        exit_depth: loops after which it was read; None for tokens of a prompt.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    exit_depth: int | None = None


@dataclass(frozen=True)
class Event:
    """The next token of a request, its end, or both.

    The events of a request come in the order of its output; the first one has `prompt` if that was
    asked for, and the last one, and no other, a finish reason. A request that draws no token has
    one event without a token.

    Attributes:
        request: the id that `Engine.submit` gave.
        token: the next one of the output.
        finish_reason: "stop" for a stop id, "length" for `max_tokens`, "error" for a request that
            cannot go on.
        error: one sentence, with "error" only.
        prompt: the tokens of the prompt with their log-probabilities; that of the first is None.
    """

    request: int
    token: Token | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    prompt: tuple[Token, ...] | None = None


@dataclass(frozen=True)
class Stats:
    """State and totals of an engine; an engine leaves at 0 what it does not have.

    Attributes:
        waiting, running: requests that have no pages yet, and that have.
        pages, free_pages: of the KV pool.
        steps, rows: launches of a block, and rows in them.
        prompt_tokens, output_tokens: computed from prompts, and drawn.
        cached_tokens: of prompts, taken from the prefix cache.
        fill_rows: rows that only filled KV of tokens that had left earlier.
        preemptions: requests whose pages were taken away for a time.
        exits: tokens read after loop 1, 2, ..., B.
    """

    waiting: int = 0
    running: int = 0
    pages: int = 0
    free_pages: int = 0
    steps: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    fill_rows: int = 0
    preemptions: int = 0
    exits: tuple[int, ...] = ()


class Engine(Protocol):
    """Draws tokens for many requests at a time."""

    limits: Limits

    def submit(self, request: Request) -> int:
        """Queues the request; the id, never used again, that its events will have.

        Raises:
            ValueError: `request.check(limits)` fails, or the KV pool can never hold it.
        """
        ...

    def cancel(self, request: int) -> None:
        """No event of the request comes any more, and what it holds is freed, at the latest by the
        next step; nothing happens to one that has ended."""
        ...

    def step(self) -> list[Event]:
        """One tick. What it raises ends the engine and every request in it."""
        ...

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        ...

    def stats(self) -> Stats: ...
