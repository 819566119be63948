"""What open requests have said so far, and the events of what they say next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_ext.serve.protocol import Event, Request, Token
from gemma_ext.serve.sampling import Sampled
from gemma_ext.serve.stats import Latencies

REASONS = (None, "stop", "length", "error")
"""How an output ends, by the number that the scheduler has for it."""


@dataclass
class Output:
    """Of an open request.

    Attributes:
        drawn: ids so far.
        depths: loops after which its tokens are read, where they are replayed.
        scored: tokens of its prompt with their log-probabilities, until they have been told.
    """

    request: Request
    depths: Sequence[int]
    drawn: list[int] = field(default_factory=list)
    scored: list[Token] = field(default_factory=list)


class Outputs:
    """Open requests by id.

    Args:
        clock: seconds, from any start.

    Attributes:
        latencies: of requests and tokens.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.latencies = clock, Latencies()
        self._open: dict[int, Output] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, id: int) -> bool:
        return id in self._open

    def __getitem__(self, id: int) -> Output:
        return self._open[id]

    def add(self, id: int, request: Request, depths: Sequence[int]) -> None:
        self._open[id] = Output(request, depths)
        if request.prompt_logprobs is not None:
            self._open[id].scored.append(Token(request.prompt[0]))
        self.latencies.submitted(id, self.clock())

    def score(self, id: int, given: Sequence[int], scored: Sampled, asked: int) -> None:
        """Tokens of a prompt, with log-probabilities of `asked` likeliest ones."""
        self._open[id].scored += [
            Token(token, *_likeliest(scored, i, asked)) for i, token in enumerate(given)
        ]

    def tell(
        self,
        ids: Sequence[int],
        depths: Sequence[int],
        outputs: Sequence[int],
        ends: Sequence[int],
        sampled: Sampled,
    ) -> list[Event]:
        """The events of tokens, as the scheduler has taken them.

        Args:
            ids: of the requests.
            depths: loops that each token ran.
            outputs: tokens that were drawn before it.
            ends: a place of `REASONS`; below 0, nobody hears of the token.
        """
        now, drawn, events = self.clock(), sampled.ids.tolist(), []
        for i, (id, how) in enumerate(zip(ids, ends, strict=True)):
            output = self._open.get(id)
            if output is None or how < 0:
                continue
            output.drawn.append(drawn[i])
            asked = output.request.params.logprobs
            logprob, top = (None, ()) if asked is None else _likeliest(sampled, i, asked)
            prompt = None
            if outputs[i] == 0 and output.scored:
                prompt, output.scored = tuple(output.scored), []
            reason = REASONS[how]
            events.append(Event(id, Token(drawn[i], logprob, top, depths[i]), reason, None, prompt))
            self.latencies.token(id, now)
            if reason:
                del self._open[id]
                self.latencies.finished(id)
        return events

    def end(self, id: int, reason: str, error: str | None) -> Event:
        """The event of an end without a token."""
        output = self._open.pop(id)
        self.latencies.finished(id)
        return Event(id, None, reason, error, tuple(output.scored) or None)

    def drop(self, id: int) -> None:
        """Nobody hears of the request any more."""
        self._open.pop(id, None)
        self.latencies.dropped(id)


def _likeliest(sampled: Any, i: int, asked: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    if asked == 0:
        return float(sampled.logprobs[i]), ()
    ids, values = sampled.top_ids[i, :asked].tolist(), sampled.top_logprobs[i, :asked].tolist()
    return float(sampled.logprobs[i]), tuple(zip(ids, values, strict=True))
