"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from gemma_ext.serve.http import logprobs
from gemma_ext.serve.http.errors import ApiError
from gemma_ext.serve.http.generation import Generation, Service, longest_output, sampling
from gemma_ext.serve.http.output import Piece
from gemma_ext.serve.http.schemas import ChatBody


class Chat:
    """An answer of this route.

    Args:
        service: that the request came to.
        body: of the request.
        prompt: ids of the conversation.

    Raises:
        ApiError: 400, fields that do not go together or that the engine cannot do.
    """

    def __init__(self, service: Service, body: ChatBody, prompt: list[int]) -> None:
        if body.top_logprobs is not None and not body.logprobs:
            message = "top_logprobs: expected logprobs to be true beside it"
            raise ApiError(400, message, param="top_logprobs")
        asked = body.max_tokens
        if body.max_completion_tokens is not None:
            asked = body.max_completion_tokens
        wanted = (body.top_logprobs or 0) if body.logprobs else None
        self._generation = Generation(
            service,
            body,
            [prompt],
            sampling(service, body, longest_output(service, [prompt], asked), wanted),
            choices=body.choices,
            kind="chatcmpl",
        )
        self._service, self._body = service, body
        self._begun: set[int] = set()

    async def start(self) -> None:
        await self._generation.start()

    def close(self) -> None:
        self._generation.close()

    async def whole(self) -> dict[str, Any]:
        told = await self._generation.whole()
        choices = []
        for index, pieces in enumerate(told):
            text = "".join(piece.text for piece in pieces)
            message = {"role": "assistant", "content": text, "refusal": None}
            choices.append({**self._choice(index, pieces), "message": message})
        usage = self._generation.usage()
        return self._generation.answer("chat.completion", choices, usage=usage)

    def events(self) -> AsyncIterator[bytes]:
        return self._generation.events("chat.completion.chunk", self._chunks)

    def _chunks(self, place: int, piece: Piece) -> list[dict[str, Any]]:
        chunks = []
        if place not in self._begun:
            self._begun.add(place)
            delta = {"role": "assistant", "content": "", "refusal": None}
            empty = Piece("", (), None, None)
            chunks.append({**self._choice(place, [empty]), "delta": delta})
        if not piece.silent:
            delta = {"content": piece.text} if piece.text else {}
            chunks.append({**self._choice(place, [piece]), "delta": delta})
        return chunks

    def _choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        reason = pieces[-1].finish_reason
        choice = {"index": index, "logprobs": None, "finish_reason": reason}
        tokens = [pair for piece in pieces for pair in piece.tokens]
        if self._body.logprobs:
            choice["logprobs"] = logprobs.of_chat(tokens, self._service.served.vocabulary)
        if self._body.return_exit_depths and reason is not None:
            choice["exit_depths"] = self._generation.outputs[index].depths
        return choice
