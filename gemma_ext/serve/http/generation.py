"""From a body that passed to the pieces of its answer."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_ext._version import __version__
from gemma_ext.serve.async_engine import AsyncEngine
from gemma_ext.serve.batch import EngineError
from gemma_ext.serve.http.errors import FAULT, ApiError, of_engine, of_value
from gemma_ext.serve.http.metrics import Metrics
from gemma_ext.serve.http.output import Output, Piece
from gemma_ext.serve.http.schemas import Sampled
from gemma_ext.serve.http.served import Served
from gemma_ext.serve.http.settings import Settings
from gemma_ext.serve.protocol import Event, Request, SamplingParams

Chunk = Callable[[int, Piece], list[dict[str, Any]]]


@dataclass
class Service:
    """What every route needs."""

    engine: AsyncEngine
    served: Served
    settings: Settings
    metrics: Metrics


class Generation:
    """All choices of one answer.

    Args:
        service: that the request came to.
        body: of the request.
        prompts: ids of each.
        params: of every choice.
        choices: drawn from each prompt.
        prompt_logprobs: as of `Request`.
        kind: begins the id of the answer.

    Attributes:
        outputs: of each choice, those of a prompt side by side.

    Raises:
        ApiError: 400, the engine can never answer this.
    """

    def __init__(
        self,
        service: Service,
        body: Sampled,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        choices: int,
        prompt_logprobs: int | None = None,
        kind: str,
    ) -> None:
        self.service, self.body, self.prompts, self.params = service, body, prompts, params
        try:
            self._requests = [
                Request(tuple(prompt), params, choice, prompt_logprobs)
                for prompt in prompts
                for choice in range(choices)
            ]
            for request in self._requests[::choices]:
                request.check(service.engine.limits)
        except (TypeError, ValueError) as error:
            raise of_value(error) from None
        self.outputs = [
            Output(service.served.tokenizer, request.prompt, body.stop)
            for request in self._requests
        ]
        self._head = {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.served.name,
            "system_fingerprint": f"gemma_ext-{__version__}",
        }
        self._last_token: dict[int, float] = {}

    async def start(self) -> None:
        """Submits all choices.

        Raises:
            ApiError: the engine refuses, is full or is gone.
        """
        engine = self.service.engine
        try:
            self._batch = await engine.submit(
                *self._requests, seconds=self.service.settings.request_seconds
            )
        except ValueError as error:
            raise of_value(error) from None
        except EngineError as error:
            raise of_engine(error) from None
        for prompt in self.prompts:
            self.service.metrics.prompt_length.observe(len(prompt))

    def close(self) -> None:
        """Ends what has not ended; to be called after `start`, whatever happens."""
        self.service.engine.close(self._batch)
        for output in self.outputs:
            self.service.metrics.output_length.observe(output.drawn)

    async def pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """(place of the choice, piece) pairs as they come.

        Raises:
            ApiError: a choice cannot be answered any further.
        """
        ended: set[int] = set()
        try:
            while taken := await self._batch.take():
                found = []
                for place, event in taken:
                    if place in ended:
                        continue
                    self._measure(place, event)
                    piece = self.outputs[place].push(event)
                    if piece.finish_reason is not None:
                        ended.add(place)
                        if event.finish_reason is None:  # a stop string
                            self.service.engine.cancel(self._batch, place)
                    found.append((place, piece))
                yield found
        except EngineError as error:
            raise of_engine(error) from None

    async def whole(self) -> list[list[Piece]]:
        """The pieces of each choice, after all have ended."""
        told: list[list[Piece]] = [[] for _ in self.outputs]
        async for found in self.pieces():
            for place, piece in found:
                told[place].append(piece)
        return told

    def answer(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices, **more}

    def usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self.prompts))
        drawn = sum(output.drawn for output in self.outputs)
        depths = [depth for output in self.outputs for depth in output.depths]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "mean_exit_depth": sum(depths) / len(depths) if depths else None,
        }

    async def events(self, kind: str, chunk: Chunk) -> AsyncIterator[bytes]:
        """Server-sent events of the answer; a fault on the way is the last of them.

        Args:
            kind: `object` of the chunks.
            chunk: the choices of the chunks that a piece becomes.
        """
        options = self.body.stream_options
        usage = options is not None and options.include_usage
        more = {"usage": None} if usage else {}
        try:
            async for found in self.pieces():
                choices = [one for place, piece in found for one in chunk(place, piece)]
                if choices:
                    yield b"".join(_event(self.answer(kind, [one], **more)) for one in choices)
        except Exception as error:
            if not isinstance(error, ApiError):
                logging.getLogger(__name__).exception("a stream failed")
                error = FAULT
            yield _event(error.body)
            return
        if usage:
            yield _event(self.answer(kind, [], usage=self.usage()))
        yield b"data: [DONE]\n\n"

    def _measure(self, place: int, event: Event) -> None:
        if event.token is None:
            return
        now, metrics = time.monotonic(), self.service.metrics
        if place in self._last_token:
            metrics.between_tokens_seconds.observe(now - self._last_token[place])
        else:
            metrics.first_token_seconds.observe(now - self._batch.submitted)
        self._last_token[place] = now


def check_choices(service: Service, count: int) -> None:
    """Raises a 400 for more choices, prompts times those of each, than a request may have."""
    most = min(service.settings.most_choices, service.engine.most_open)
    if count > most:
        raise ApiError(400, f"n: expected at most {most} choices in all, got {count}", param="n")


def sampling(
    service: Service, body: Sampled, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """How the tokens of a body are drawn.

    Raises:
        ApiError: 400, a value that does not fit.
    """
    try:
        return body.params(max_tokens, logprobs, service.served.stop_ids)
    except (TypeError, ValueError) as error:
        raise of_value(error) from None


def longest_output(
    service: Service,
    prompts: Sequence[list[int]],
    asked: int | None,
    usual: int | None = None,
) -> int:
    """Tokens to draw at most: what was asked for, or else no more than is `usual`, than the
    context leaves and than the server allows.

    Raises:
        ApiError: 400, the context does not hold prompt and output.
    """
    longest, limit = max(map(len, prompts)), service.engine.limits.max_model_len
    most = service.settings.most_tokens
    if asked is None:
        bounds = (usual, most, limit - longest)
        asked = max(1, min(bound for bound in bounds if bound is not None))
    if longest + asked > limit:
        raise ApiError(
            400,
            f"max_tokens: the context has {limit} tokens, prompt and output would have "
            f"{longest} + {asked}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if most is not None and asked > most:
        raise ApiError(400, f"max_tokens: expected at most {most}, got {asked}", param="max_tokens")
    return asked


def _event(data: dict[str, Any]) -> bytes:
    # in ASCII: clients that cut a stream at every line end of Unicode would cut a text in two
    return b"data: " + json.dumps(data).encode() + b"\n\n"
