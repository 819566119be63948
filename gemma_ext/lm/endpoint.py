"""A model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from gemma_ext.lm.answers import FirstTokens, completed, echoed, first_tokens, score_of
from gemma_ext.lm.base import Base, lengths
from gemma_ext.lm.http import Client, EndpointError, Usage
from gemma_ext.lm.protocol import Choice, Completion, Perplexity, Prompt, Sampling, Score
from gemma_ext.lm.store import Store, answer

_TOP = 20  # first tokens that a chat endpoint tells at most


class EndpointModel(Base):
    """The language model protocol over HTTP.

    | api           | generate | choices                  | logprobs, perplexity          |
    |---------------|----------|--------------------------|-------------------------------|
    | "chat"        | yes      | of one-token options, by | no                            |
    |               |          | the likeliest tokens     |                               |
    | "completions" | yes      | yes                      | where the server can `echo`   |

    Args:
        url: up to and including the version, as "http://localhost:8000/v1".
        model: as the endpoint calls it.
        api: "chat" sends messages (a text is one of the user), "completions" sends text.
        key: None takes $OPENAI_API_KEY, or none.
        concurrency: requests under way at a time.
        requests_per_minute, retries, backoff, timeout, prices: as in `gemma_ext.lm.http.Client`.
        begin: what stands before a text or a continuation of nothing, if the server puts no token
            there itself.
        limit: name of the field that has `max_tokens`; newer chat models want
            "max_completion_tokens".
        extra: further fields of every request.
        cache: sqlite file in which every answer is kept.
        show_progress: draw bars on stderr.

    Attributes:
        usage: requests, retries, tokens and cost so far; cached answers cost nothing.

    Raises:
        ValueError: an unknown api, an option below its least value.
        EndpointError: from every method: a refusal, no answer after all retries, or one without
            what was asked for.

    Example:
        >>> lm = EndpointModel("https://api.openai.com/v1", "gpt-4o-mini", prices=(0.15, 0.60))
        >>> lm.generate(["Name a colour."], Sampling(max_tokens=5))[0].text
        >>> lm.usage.cost
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api: str = "chat",
        key: str | None = None,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        retries: int = 6,
        backoff: float = 1.0,
        timeout: float = 120.0,
        prices: tuple[float, float] = (0.0, 0.0),
        begin: str = "",
        limit: str = "max_tokens",
        extra: Mapping[str, Any] | None = None,
        cache: str | Path | Store | None = None,
        show_progress: bool = True,
    ) -> None:
        if api not in ("chat", "completions"):
            raise ValueError(f"expected api to be 'chat' or 'completions', got {api!r}")
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if value < least:
                raise ValueError(f"expected {name} to be at least {least}, got {value}")
        if requests_per_minute is not None and not requests_per_minute > 0:
            raise ValueError(
                f"expected requests_per_minute to be positive, got {requests_per_minute}"
            )
        self.model, self.api, self.begin, self.limit = model, api, begin, limit
        self.extra, self.concurrency = dict(extra or {}), concurrency
        self.store = cache if isinstance(cache, Store) or cache is None else Store(cache)
        self.show_progress = show_progress
        self._client = Client(
            url,
            key or os.environ.get("OPENAI_API_KEY"),
            requests_per_minute=requests_per_minute,
            retries=retries,
            backoff=backoff,
            timeout=timeout,
            prices=prices,
        )

    @property
    def usage(self) -> Usage:
        return self._client.usage

    def logprobs(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[Score]:
        self._needs_completions("log-probabilities of continuations")
        return super().logprobs(prompts, continuations)

    def choices(
        self, prompts: Sequence[Prompt], options: Sequence[str] | Sequence[Sequence[str]]
    ) -> list[Choice]:
        found = super().choices(prompts, options)
        for choice in found:
            if all(score.logprob == -math.inf for score in choice.scores):
                raise EndpointError(
                    f"expected one of the options {choice.options} among the {_TOP} likeliest "
                    f"first tokens, got none"
                )
        return found

    def perplexity(self, texts: Sequence[str]) -> list[Perplexity]:
        self._needs_completions("log-probabilities of texts")
        return super().perplexity(texts)

    def _complete(
        self, prompts: list[Prompt], repetitions: list[int], sampling: Sampling
    ) -> list[Completion]:
        bodies = []
        for prompt, count in zip(prompts, repetitions, strict=True):
            body = {**self._asking(prompt), self.limit: sampling.max_tokens}
            body.update(temperature=sampling.temperature, top_p=sampling.top_p)
            if sampling.temperature:
                body["seed"] = sampling.seed + count
            if sampling.top_k:
                body["top_k"] = sampling.top_k
            if sampling.stop:
                body["stop"] = list(sampling.stop)
            # some servers know no seed: a repeated prompt is a question of its own all the same
            bodies.append((body, count))
        return self._answers(bodies, completed, Completion, "generating")

    def _score(self, pairs: list[tuple[Prompt, str]]) -> list[Score]:
        if self.api == "chat":
            return self._score_first_tokens(pairs)
        asked = [(self._echo(prompt, text), text) for prompt, text in pairs if text]
        scores = iter(self._answers(asked, echoed, score_of, "scoring"))
        return [next(scores) if text else Score((), True) for _, text in pairs]

    def _echo(self, prompt: Prompt, text: str) -> dict[str, Any]:
        body = self._asking(prompt)
        body["prompt"] = (body["prompt"] or self.begin) + text
        # a token is asked for because some servers refuse none; it is not looked at
        return {**body, "echo": True, self.limit: 1, "logprobs": 1, "temperature": 0}

    def _perplexity(self, texts: list[str]) -> list[Perplexity]:
        scores = self._score([("", text) for text in texts])
        return [
            Perplexity(score.logprob, len(score.token_logprobs), *lengths(text))
            for text, score in zip(texts, scores, strict=True)
        ]

    def _score_first_tokens(self, pairs: list[tuple[Prompt, str]]) -> list[Score]:
        """Scores of options that are one token, by what the endpoint tells of the first token."""
        body = {self.limit: 1, "temperature": 0, "logprobs": True, "top_logprobs": _TOP}
        asked = [({**self._asking(prompt), **body}, text) for prompt, text in pairs]
        # every option of a prompt asks the same
        tops = self._answers(
            [(body, "") for body, _ in asked], first_tokens, FirstTokens, "scoring"
        )
        return [top.score(text) for top, (_, text) in zip(tops, asked, strict=True)]

    def _asking(self, prompt: Prompt) -> dict[str, Any]:
        body = {"model": self.model, **self.extra}
        if self.api == "chat":
            message = {"role": "user", "content": prompt}
            return {**body, "messages": [message] if isinstance(prompt, str) else prompt}
        if not isinstance(prompt, str):
            raise TypeError("expected prompts of text for api='completions', got messages")
        return {**body, "prompt": prompt}

    def _answers(
        self,
        questions: list[tuple[dict[str, Any], Any]],
        read: Callable[[dict[str, Any], Any], Any],
        decode: Callable[..., Any],
        title: str,
    ) -> list[Any]:
        """What `read` makes of the answer to each (body, what else `read` has to know)."""
        path = "/chat/completions" if self.api == "chat" else "/completions"

        def ask(place: int) -> Any:
            body, known = questions[place]
            response = self._client.post(path, body)
            try:
                return read(response, known)
            except (KeyError, IndexError, TypeError, AttributeError):
                raise EndpointError(
                    f"{self._client.url}{path}: expected the {title} answer of an OpenAI endpoint, "
                    f"got {str(response)[:200]}"
                ) from None

        def work(places: list[int]) -> Iterator[list[tuple[int, Any]]]:
            pool = ThreadPoolExecutor(self.concurrency)
            waiting = {pool.submit(ask, place): place for place in places}
            failure = None
            try:
                for done in as_completed(waiting):
                    if done.cancelled():
                        continue
                    if (error := done.exception()) is None:
                        yield [(waiting[done], done.result())]
                    elif failure is None:
                        # what is under way is paid for, so it is waited for and kept
                        failure = error
                        for future in waiting:
                            future.cancel()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            if failure is not None:
                raise failure

        return answer(
            [(title, *question) for question in questions],
            work,
            decode,
            store=self.store,
            model=lambda: f"{self._client.url} {self.api}",
            title=title,
            show_progress=self.show_progress,
        )

    def _needs_completions(self, what: str) -> None:
        if self.api == "chat":
            raise NotImplementedError(f"a chat endpoint gives no {what}; use api='completions'")
