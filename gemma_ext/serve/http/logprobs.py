"""Log-probabilities in the two forms of the API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gemma_ext.serve.protocol import Token
from gemma_ext.serve.text import Vocabulary

_LEAST = -9999.0  # JSON has neither infinity nor NaN


def _told(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST


def of_completion(tokens: Iterable[tuple[Token, int]], vocabulary: Vocabulary) -> dict[str, Any]:
    """Four lists; a token is among its likeliest ones even where it is not one of them.

    Args:
        tokens: and the offset of each in the text of the choice.
    """
    names, values, tops, offsets = [], [], [], []
    for token, offset in tokens:
        names.append(vocabulary.name(token.id))
        offsets.append(offset)
        if token.logprob is None:  # nothing stands before the first token of a prompt
            values.append(None)
            tops.append(None)
            continue
        values.append(_told(token.logprob))
        top = {vocabulary.name(id): _told(value) for id, value in token.top}
        top.setdefault(names[-1], values[-1])
        tops.append(top)
    return {
        "tokens": names,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def of_chat(tokens: Iterable[tuple[Token, int]], vocabulary: Vocabulary) -> dict[str, Any]:
    """One object for each token, with its bytes."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        told = {"token": vocabulary.name(id), "logprob": _told(logprob)}
        return {**told, "bytes": list(vocabulary.bytes(id))}

    content = [
        {
            **entry(token.id, token.logprob),
            "top_logprobs": [entry(id, value) for id, value in token.top],
        }
        for token, _ in tokens
    ]
    return {"content": content, "refusal": None}
