"""An engine without kernels: next-token logits come from a function of the whole sequence.

For tests of what stands before an engine, and the sequential decoding that a batched engine is
compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gemma_ext.serve.protocol import Event, Limits, Request, SamplingParams, Stats, Token

PAGE = 16  # tokens
Logits = Callable[[Sequence[int]], np.ndarray]
Depth = Callable[[Sequence[int]], int]


def random_bigrams(vocabulary: int, seed: int = 0) -> Logits:
    """Logits [V] that are a function of the last token alone."""

    def logits(ids: Sequence[int]) -> np.ndarray:
        return np.random.default_rng([seed, ids[-1]]).normal(scale=3.0, size=vocabulary)

    return logits


@dataclass
class _Running:
    request: Request
    id: int
    output: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [*self.request.prompt, *self.output]

    @property
    def pages(self) -> int:
        """For all that the request may become, so that none has to wait inside."""
        total = len(self.request.prompt) + self.request.params.max_tokens
        return -(-total // PAGE)


class ScriptedEngine:
    """One token per step of each running request.

    Args:
        limits: what is refused beyond; the context is no longer than the pool.
        logits: of the next token, [V] float, for the ids so far.
        depth: the loop after which the next token is read, for the ids so far; 1 by default.
        running, pages: most requests in a step, and the KV pool, which only counts here.
        seconds: that a step takes beyond its work.
        fail_at: number of the step that raises, from 1; None for none.
    """

    def __init__(
        self,
        limits: Limits,
        logits: Logits | None = None,
        *,
        depth: Depth = lambda ids: 1,
        running: int = 16,
        pages: int = 4096,
        seconds: float = 0.0,
        fail_at: int | None = None,
    ) -> None:
        longest = min(limits.max_model_len, PAGE * pages)
        self.limits = replace(limits, max_model_len=longest)
        self.most_running, self.pages = running, pages
        self._logits = logits or random_bigrams(limits.vocabulary)
        self._depth, self._seconds, self._fail_at = depth, seconds, fail_at
        self._waiting: list[_Running] = []
        self._running: list[_Running] = []
        self._submitted = self._steps = self._prompt_tokens = self._output_tokens = 0
        self._exits = [0] * limits.loops

    def submit(self, request: Request) -> int:
        request.check(self.limits)
        self._submitted += 1
        self._waiting.append(_Running(request, self._submitted))
        return self._submitted

    def cancel(self, request: int) -> None:
        for queue in (self._waiting, self._running):
            queue[:] = [entry for entry in queue if entry.id != request]

    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def step(self) -> list[Event]:
        self._steps += 1
        if self._steps == self._fail_at:
            raise RuntimeError(f"scripted to fail at step {self._steps}")
        time.sleep(self._seconds)
        while self._waiting and len(self._running) < self.most_running:
            if self._waiting[0].pages > self._free_pages:
                break
            self._running.append(self._waiting.pop(0))
        events = [self._advance(entry) for entry in self._running]
        ended = {event.request for event in events if event.finish_reason is not None}
        self._running = [entry for entry in self._running if entry.id not in ended]
        return events

    def stats(self) -> Stats:
        return Stats(
            waiting=len(self._waiting),
            running=len(self._running),
            pages=self.pages,
            free_pages=self._free_pages,
            steps=self._steps,
            rows=sum(self._exits),
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            exits=tuple(self._exits),
        )

    @property
    def _free_pages(self) -> int:
        return self.pages - sum(entry.pages for entry in self._running)

    def _advance(self, entry: _Running) -> Event:
        request, params = entry.request, entry.request.params
        prompt = None
        if not entry.output:
            self._prompt_tokens += len(request.prompt)
            if request.prompt_logprobs is not None:
                prompt = self._score(request)
        if params.max_tokens == 0:
            return Event(entry.id, finish_reason="length", prompt=prompt)
        logits = np.asarray(self._logits(entry.ids), np.float64)
        id = draw(logits, entry.output, request)
        depth = min(
            max(self._depth(entry.ids), params.min_loops), params.max_loops or self.limits.loops
        )
        entry.output.append(id)
        self._output_tokens += 1
        self._exits[depth - 1] += 1
        reason = None
        if id in params.stop_ids:
            reason = "stop"
        elif len(entry.output) == params.max_tokens:
            reason = "length"
        token = _token(id, logits / params.divisor, params.logprobs, depth)
        return Event(entry.id, token, reason, prompt=prompt)

    def _score(self, request: Request) -> tuple[Token, ...]:
        ids = request.prompt
        scored = [
            _token(ids[place], self._logits(ids[:place]), request.prompt_logprobs, None)
            for place in range(1, len(ids))
        ]
        return (Token(ids[0]), *scored)


def draw(logits: np.ndarray, output: Sequence[int], request: Request) -> int:
    """The token that the request draws after `output`.

    Args:
        logits: [V] float64.
        output: tokens drawn before.
    """
    params = request.params
    values = adjust(logits, request.prompt, output, params)
    if params.temperature == 0:
        return int(values.argmax())
    values = keep_likeliest(values / params.temperature, params)
    key = [params.seed % 2**64, request.choice, len(request.prompt) + len(output)]
    return int((values + np.random.default_rng(key).gumbel(size=len(values))).argmax())


def adjust(
    logits: np.ndarray, prompt: Sequence[int], output: Sequence[int], params: SamplingParams
) -> np.ndarray:
    """Logits [V] after bias and penalties, before the temperature."""
    values = np.array(logits, np.float64)
    for token, bias in params.logit_bias:
        values[token] += bias
    if len(output) < params.min_tokens:
        values[list(params.stop_ids)] = -np.inf
    seen = np.unique([*prompt, *output])
    factor = np.where(values[seen] > 0, 1 / params.repetition_penalty, params.repetition_penalty)
    values[seen] *= factor
    drawn, counts = np.unique(np.array(output, np.int64), return_counts=True)
    values[drawn] -= params.presence_penalty + params.frequency_penalty * counts
    return values


def keep_likeliest(values: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Logits [V] with -inf where top-k, top-p or min-p leave a token out; lower ids win ties."""
    order = np.argsort(-values, kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    shares = np.exp(values[order] - values[order[0]])
    shares /= shares.sum()
    before = np.cumsum(shares) - shares
    order = order[(before < params.top_p) & (shares >= params.min_p * shares[0])]
    kept = np.full_like(values, -np.inf)
    kept[order] = values[order]
    return kept


def _token(id: int, logits: np.ndarray, most: int | None, depth: int | None) -> Token:
    if most is None:
        return Token(id, exit_depth=depth)
    logits = np.asarray(logits, np.float64)
    top = logits.max()
    logprobs = logits - (top + np.log(np.exp(logits - top).sum()))
    likeliest = np.argsort(-logprobs, kind="stable")[:most]
    pairs = tuple((int(token), float(logprobs[token])) for token in likeliest)
    return Token(id, float(logprobs[id]), pairs, depth)
