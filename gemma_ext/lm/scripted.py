"""A model that says what it is told to: for tests of what is built on the protocol."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from gemma_ext.lm.base import Base, lengths
from gemma_ext.lm.protocol import Completion, Perplexity, Prompt, Sampling, Score

_TOKEN = re.compile(r"\s*\S+|\s+$")  # a word with the space before it


class ScriptedModel(Base):
    """Answers from tables or functions; its tokens are words with the white space before them.

    Args:
        completions: from a prompt to what the model writes, before stop strings and `max_tokens`.
        logprobs: from (prompt, continuation) to the logarithm of its probability, or to one for
            each token. Texts are scored as continuations of "".

    A prompt of messages is looked up as a tuple of (role, content).

    Attributes:
        asked: every prompt to complete and every pair to score, in the order of the calls.

    Raises:
        ValueError: what is asked is not in the table.

    Example:
        >>> lm = ScriptedModel(logprobs=lambda prompt, text: -float(len(text)))
        >>> lm.choices(["2 + 2 ="], [" 4", " four"])[0].best()
        0
    """

    def __init__(
        self,
        completions: Mapping[object, str] | Callable[[object], str] | None = None,
        logprobs: Mapping[tuple[object, str], float | Sequence[float]]
        | Callable[[object, str], float | Sequence[float]]
        | None = None,
    ) -> None:
        self._completions, self._logprobs = completions or {}, logprobs or {}
        self.asked: list[object] = []

    def _complete(
        self, prompts: list[Prompt], repetitions: list[int], sampling: Sampling
    ) -> list[Completion]:
        return [_ended(self._look_up(self._completions, _key(p)), sampling) for p in prompts]

    def _score(self, pairs: list[tuple[Prompt, str]]) -> list[Score]:
        return [_scored(self._look_up(self._logprobs, _key(p), text), text) for p, text in pairs]

    def _perplexity(self, texts: list[str]) -> list[Perplexity]:
        found = []
        for text, score in zip(texts, self._score([("", text) for text in texts]), strict=True):
            found.append(Perplexity(score.logprob, len(_TOKEN.findall(text)), *lengths(text)))
        return found

    def _look_up(self, script: object, *question: object) -> object:
        key = question[0] if len(question) == 1 else question
        self.asked.append(key)
        if callable(script):
            return script(*question)
        if key not in script:
            raise ValueError(f"expected one of the {len(script)} lines of the script, got {key!r}")
        return script[key]


def _key(prompt: Prompt) -> object:
    if isinstance(prompt, str):
        return prompt
    return tuple((message["role"], message["content"]) for message in prompt)


def _ended(text: str, sampling: Sampling) -> Completion:
    places = [place for place in map(text.find, sampling.stop) if place >= 0]
    text = text[: min(places, default=len(text))]
    tokens = _TOKEN.findall(text)
    kept = tokens[: sampling.max_tokens]
    return Completion("".join(kept), len(kept), len(kept) == len(tokens) or bool(places))


def _scored(value: object, text: str) -> Score:
    if isinstance(value, Sequence):
        return Score(tuple(map(float, value)), None)
    count = len(_TOKEN.findall(text))
    return Score((float(value) / count,) * count, None) if count else Score((), None)
