"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from gemma_ext.serve.http import logprobs
from gemma_ext.serve.http.errors import ApiError
from gemma_ext.serve.http.generation import Generation, Service, longest_output, sampling
from gemma_ext.serve.http.output import Piece
from gemma_ext.serve.http.schemas import CompletionBody
from gemma_ext.serve.text import Decoder

_KIND = "text_completion"
_DEFAULT_TOKENS = 16
_ECHO = 16  # letters that could be encoded while a token is decoded alone


class Completion:
    """An answer of this route.

    Args:
        service: that the request came to.
        body: of the request.
        prompts: ids of each prompt.

    Raises:
        ApiError: 400, fields that do not go together or that the engine cannot do.
    """

    def __init__(self, service: Service, body: CompletionBody, prompts: list[list[int]]) -> None:
        self._drawn, self._kept = body.drawn, body.choices
        wrong = f"best_of: expected at least n, {self._kept}" if self._drawn < self._kept else None
        if self._drawn > self._kept and body.stream:
            wrong = f"best_of: expected n, {self._kept}, for a stream"
        if wrong:
            raise ApiError(400, f"{wrong}, got {body.best_of}", param="best_of")
        longest = longest_output(service, prompts, body.max_tokens, _DEFAULT_TOKENS)
        wanted = body.logprobs
        if wanted is None and self._drawn > self._kept:
            wanted = 0  # tells which are best
        self._generation = Generation(
            service,
            body,
            prompts,
            sampling(service, body, longest, wanted),
            choices=self._drawn,
            prompt_logprobs=body.logprobs if body.echo else None,
            kind="cmpl",
        )
        self._service, self._body, self._prompts = service, body, prompts
        self._echoes: list[tuple[str, list[int]]] = []  # of prompts: text, offsets of its tokens
        self._echoed: set[int] = set()

    async def start(self) -> None:
        if self._body.echo:
            for asked, ids in zip(self._body.prompt, self._prompts, strict=True):
                echo = await self._service.served.apart(
                    partial(self._echo, asked, ids), _ECHO * len(ids)
                )
                self._echoes.append(echo)
        await self._generation.start()

    def close(self) -> None:
        self._generation.close()

    async def whole(self) -> dict[str, Any]:
        told = await self._generation.whole()
        kept: list[int] = []
        for first in range(0, len(told), self._drawn):
            places = list(range(first, first + self._drawn))
            if self._drawn > self._kept:
                places.sort(key=self._mean_logprob, reverse=True)
            kept += places[: self._kept]
        choices = [self._choice(index, place, told[place]) for index, place in enumerate(kept)]
        return self._generation.answer(_KIND, choices, usage=self._generation.usage())

    def events(self) -> AsyncIterator[bytes]:
        return self._generation.events(_KIND, self._chunks)

    def _chunks(self, place: int, piece: Piece) -> list[dict[str, Any]]:
        if piece.silent and (place in self._echoed or not self._body.echo):
            return []
        return [self._choice(place, place, [piece])]

    def _choice(self, index: int, place: int, pieces: list[Piece]) -> dict[str, Any]:
        """The choice so far, or its next part; the prompt stands before the first part if asked."""
        text = "".join(piece.text for piece in pieces)
        tokens = [pair for piece in pieces for pair in piece.tokens]
        if self._body.echo:
            prompt, offsets = self._echoes[place // self._drawn]
            tokens = [(token, len(prompt) + offset) for token, offset in tokens]
            if place not in self._echoed:
                self._echoed.add(place)
                text = prompt + text
                tokens = [*zip(pieces[0].prompt or (), offsets, strict=False), *tokens]
        reason = pieces[-1].finish_reason
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        if self._body.logprobs is not None:
            vocabulary = self._service.served.vocabulary
            choice["logprobs"] = logprobs.of_completion(tokens, vocabulary)
        if self._body.return_exit_depths and reason is not None:
            choice["exit_depths"] = self._generation.outputs[place].depths
        return choice

    def _mean_logprob(self, place: int) -> float:
        output = self._generation.outputs[place]
        return output.logprob / max(output.drawn, 1)

    def _echo(self, asked: str | list[int], ids: list[int]) -> tuple[str, list[int]]:
        text = asked if isinstance(asked, str) else self._service.served.decode(ids)
        offsets: list[int] = []
        if self._body.logprobs is not None:
            decoder, place = Decoder(self._service.served.tokenizer), 0
            for token in ids:
                offsets.append(min(place, len(text)))
                place += len(decoder.push(token))
        return text, offsets
