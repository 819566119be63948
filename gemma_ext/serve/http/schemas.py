"""Bodies of the API, and what of them an engine has to know.

A field that changes nothing here is taken and forgotten (`user`, `metadata`, ...); one that asks
for something the server does not do is refused, as is one that the API does not know.
"""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gemma_ext.serve.protocol import MOST_IDS, MOST_LOGPROBS, SamplingParams

MOST_STOPS = 64
MOST_STOP_LETTERS = 1024  # of one stop string; so many may be held back
MOST_STOP_IDS = MOST_IDS - 64  # the model's own join them
MOST_MESSAGES = 4096
_TOKEN = re.compile("0|[1-9][0-9]{0,18}")

_COPIED = (
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "exit_threshold",
    "min_loops",
    "max_loops",
)


def _stops(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
        raise ValueError("stop: expected a string or a list of strings")
    if len(strings) > MOST_STOPS or any(not 0 < len(s) <= MOST_STOP_LETTERS for s in strings):
        raise ValueError(
            f"stop: expected at most {MOST_STOPS} strings of 1 to {MOST_STOP_LETTERS} letters"
        )
    return tuple(strings)


def _prompts(value: Any) -> list[str | list[int]]:
    """Prompts of one to many, each a text or token ids."""
    prompts = value if isinstance(value, list) else [value]
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        prompts = [value]
    for prompt in prompts:
        ids = isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt)
        if not (ids or isinstance(prompt, str)):
            raise ValueError(
                "prompt: expected a string, a list of token ids that is not empty, or a list of "
                "these"
            )
    if not prompts:
        raise ValueError("prompt: expected at least one, got none")
    return prompts


def _bias(value: Any) -> dict[int, float]:
    pairs = {} if value is None else value
    if isinstance(pairs, dict) and len(pairs) > MOST_IDS:
        raise ValueError(f"logit_bias: expected at most {MOST_IDS} tokens, got {len(pairs)}")
    if not isinstance(pairs, dict) or not all(
        _TOKEN.fullmatch(token) and type(bias) in (int, float) for token, bias in pairs.items()
    ):
        raise ValueError("logit_bias: expected an object of token ids and numbers")
    return {int(token): bias for token, bias in pairs.items()}


def _only(name: str, *allowed: Any) -> Any:
    """A field of the API that has to say nothing."""

    def check(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"{name}: this server does not do that")
        return value

    return Annotated[Any, AfterValidator(check)]


class Known(BaseModel):
    """An object of the API, which has no other fields than these.

    The first unknown one is the error; pydantic's own refusal makes one of each.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="after")
    def _refuse_unknown(self) -> Known:
        for name in self.model_extra:
            raise PydanticCustomError("extra_forbidden", "{name}", {"name": name})
        return self


class StreamOptions(Known):
    include_usage: bool = False
    include_obfuscation: bool = False


class Sampled(Known):
    """What both kinds of completion have; None stands for the default everywhere."""

    model: str
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias)] = {}
    seed: int | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()

    # beyond the API, named as other servers do
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_STOP_IDS), FailFast()] = []
    ignore_eos: bool = False
    # of models with loops
    exit_threshold: float | None = None
    min_loops: int | None = None
    max_loops: int | None = None
    return_exit_depths: bool = False

    # taken and forgotten
    user: Any = None
    metadata: Any = None
    service_tier: Any = None
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def choices(self) -> int:
        return self.n or 1

    def params(
        self, max_tokens: int, logprobs: int | None, stop_ids: tuple[int, ...]
    ) -> SamplingParams:
        """How the output is drawn; with a seed of its own if the body has none.

        Raises:
            TypeError, ValueError: a value that does not fit.
        """
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected stream to be true beside it")
        if self.min_tokens is not None and self.min_tokens > max_tokens:
            raise ValueError(
                f"min_tokens: expected at most the {max_tokens} of max_tokens, "
                f"got {self.min_tokens}"
            )
        given = {name: value for name in _COPIED if (value := getattr(self, name)) is not None}
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias=tuple(self.logit_bias.items()),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop_ids=(*(() if self.ignore_eos else stop_ids), *self.stop_token_ids),
        )


class CompletionBody(Sampled):
    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    suffix: _only("suffix", None, "") = None
    add_special_tokens: bool = True

    @property
    def drawn(self) -> int:
        """Choices of each prompt, of which `choices` are kept."""
        return self.best_of or self.choices


_Empty = Annotated[list[Any], Field(max_length=0)] | None


class Message(Known):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    # empty in an answer of this server, which clients send back as it came
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: _Empty = None
    tool_calls: _Empty = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them.

        Raises:
            ValueError: content that is no text.
        """
        content = self.content
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            kinds = {part.get("type") if isinstance(part, dict) else None for part in content}
            if kinds != {"text"} or not all(isinstance(text, str) for text in texts):
                raise ValueError("messages: expected content of text, got parts of another type")
            content = "".join(texts)
        if not isinstance(content, str):
            raise ValueError(f"messages: expected content of text, got {type(content).__name__}")
        return {"role": self.role, "content": content}


class ChatBody(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES), FailFast()]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: _only("tools", None, []) = None
    tool_choice: _only("tool_choice", None, "none", "auto") = None
    functions: _only("functions", None, []) = None
    function_call: _only("function_call", None, "none") = None
    response_format: _only("response_format", None, {"type": "text"}) = None
    modalities: _only("modalities", None, ["text"]) = None
    audio: _only("audio", None) = None
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    prediction: Any = None
