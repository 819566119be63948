"""What the answers of an OpenAI-compatible endpoint say."""

from __future__ import annotations

import math
from typing import Any

from gemma_ext.lm.http import EndpointError
from gemma_ext.lm.protocol import Completion, Score


def completed(response: dict[str, Any], _: Any) -> Completion:
    """The completion of a prompt of text or of messages."""
    choice = response["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    tokens = (response.get("usage") or {}).get("completion_tokens") or 0
    return Completion(text or "", tokens, choice.get("finish_reason") != "length")


class FirstTokens:
    """The likeliest first tokens of an answer, and their log-probabilities."""

    def __init__(self, tops: dict[str, float]) -> None:
        self.tops = tops

    def score(self, option: str) -> Score:
        """Of all tokens that are the option but for white space around it."""
        same = [value for token, value in self.tops.items() if token.strip() == option.strip()]
        if not same:
            return Score((-math.inf,), False)
        best = max(same)
        total = best + math.log(math.fsum(math.exp(value - best) for value in same))
        return Score((total,), best == max(self.tops.values()))


def first_tokens(response: dict[str, Any], _: Any) -> FirstTokens:
    (first,) = response["choices"][0]["logprobs"]["content"][:1]
    return FirstTokens({top["token"]: top["logprob"] for top in first["top_logprobs"]})


def score_of(token_logprobs: list[float], greedy: bool | None) -> Score:
    return Score(tuple(token_logprobs), greedy)


def echoed(response: dict[str, Any], continuation: str) -> Score:
    """The score of the end of an echoed prompt; a token across its start belongs to it."""
    told = response["choices"][0]["logprobs"]
    tokens, values, tops = told["tokens"][:-1], told["token_logprobs"][:-1], told["top_logprobs"]
    end, start = continuation.encode("utf-8", "surrogatepass"), len(tokens)
    tail = b""
    while start > 0 and len(tail) < len(end):
        start -= 1
        tail = _bytes(tokens[start]) + tail
    if not tail.endswith(end):
        raise EndpointError(f"expected an echo that ends in {continuation!r}, got {tail!r}")
    if None in values[start:]:
        raise EndpointError(
            "expected a log-probability of every token, got none of the first; give a text as "
            "`begin` to stand before it"
        )
    greedy = None
    if tops:
        best = [max(top.values()) for top in tops[start : len(tokens)]]
        greedy = all(value >= top for value, top in zip(values[start:], best, strict=True))
    return Score(tuple(values[start:]), greedy)


def _bytes(token: str) -> bytes:
    """Of a token, which a server writes as bytes:\\xe2\\x82 if it is part of a character."""
    if token.startswith("bytes:"):
        return token[len("bytes:") :].encode().decode("unicode_escape").encode("latin-1")
    return token.encode("utf-8", "surrogatepass")
