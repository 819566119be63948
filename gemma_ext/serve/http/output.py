"""One choice of an answer: events of the engine to pieces of text and their tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_ext.serve.http.errors import ApiError
from gemma_ext.serve.protocol import Event, Token
from gemma_ext.serve.text import Decoder, StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """What can be told after an event.

    Attributes:
        text: never taken back.
        tokens: that begin in the text told so far, each with the offset of its first character in
            the output; only those that were not in a piece before.
        finish_reason: "stop" or "length" in the last piece.
        prompt: scored tokens of the prompt, in the first piece if they were asked for.
    """

    text: str
    tokens: tuple[tuple[Token, int], ...]
    finish_reason: str | None
    prompt: tuple[Token, ...] | None

    @property
    def silent(self) -> bool:
        return not (self.text or self.tokens or self.finish_reason or self.prompt)


class Output:
    """The text of one request as it comes.

    Args:
        tokenizer: of `transformers`.
        prompt: ids before the output.
        stops: strings that end it.

    Attributes:
        drawn: tokens so far, those that end the output or were cut off with a stop string too.
        depths: exit depth of each of them.
        logprob: sum over them, where the engine tells it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stops: Sequence[str]
    ) -> None:
        self.drawn = 0
        self.depths: list[int] = []
        self.logprob = 0.0
        self._decoder = Decoder(tokenizer, prompt)
        self._stops = StopStrings(stops)
        self._decoded = self._told = 0  # characters
        self._pending: deque[tuple[Token, int]] = deque()

    def push(self, event: Event) -> Piece:
        """The next event of the request; nothing comes after a piece with a finish reason.

        Raises:
            ApiError: 500, the request failed in the engine.
        """
        if event.finish_reason == "error":
            raise ApiError(500, event.error or "the engine could not go on", code="engine_error")
        text, reason = "", event.finish_reason
        if event.token is not None:
            self.drawn += 1
            self.logprob += event.token.logprob or 0.0
            if event.token.exit_depth is not None:
                self.depths.append(event.token.exit_depth)
            self._pending.append((event.token, self._decoded))
            if reason != "stop":  # a token that ends a text is none of it
                text = self._decoder.push(event.token.id)
        if reason is not None:
            text += self._decoder.end()
        self._decoded += len(text)
        told = self._stops.push(text)
        if self._stops.hit:
            reason = "stop"
        elif reason is not None:
            told += self._stops.end()
        self._told += len(told)
        return Piece(told, tuple(self._begun(reason)), reason, event.prompt)

    def _begun(self, reason: str | None) -> list[tuple[Token, int]]:
        all_of_it = reason is not None and not self._stops.hit
        begun = []
        while self._pending and (all_of_it or self._pending[0][1] < self._told):
            begun.append(self._pending.popleft())
        return begun
