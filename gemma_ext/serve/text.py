"""Tokens to text while they come: pieces that are never taken back, and strings that end it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# tokens; a character has at most four bytes, so more of them without one is no text
_MOST_HELD = 16


class Vocabulary:
    """What single tokens are: their bytes, and their names in an answer.

    Args:
        tokenizer: of `transformers`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        kind = json.dumps(json.loads(backend.to_str())["decoder"]) if backend else ""
        self._byte_level = _byte_alphabet() if '"ByteLevel"' in kind else None
        self._added = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items()}

    def bytes(self, token: int) -> bytes:
        """UTF-8 of the token as it stands inside a text; maybe only a part of a character."""
        if (added := self._added.get(token)) is not None:
            return added.encode()
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # a row of the head that is no token
            return b""
        if self._byte_level is not None:
            return bytes(self._byte_level[letter] for letter in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def name(self, token: int) -> str:
        r"""The text of the token; bytes:\xe2\x82 where its bytes are no text of their own."""
        if token not in self._names:
            raw = self.bytes(token)
            try:
                self._names[token] = raw.decode()
            except UnicodeDecodeError:
                self._names[token] = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return self._names[token]


class Decoder:
    """The text of tokens that come one by one.

    The pieces together are what the tokenizer makes of all tokens without the special ones, except
    where more than 16 tokens in a row are no text.

    Args:
        tokenizer: of `transformers`.
        context: tokens that came before, which say whether a space stands at the start.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-4:])
        self._read = len(self._ids)
        # a character that the context leaves open is told when it is complete
        while self._read and self._text(self._read).endswith(_REPLACEMENT):
            self._read -= 1

    def push(self, token: int) -> str:
        """What can be told after one more token; empty within a character."""
        self._ids.append(token)
        before, text = self._text(self._read), self._text()
        held = len(self._ids) - self._read
        if text.endswith(_REPLACEMENT) and held <= _MOST_HELD:
            return ""
        return self._tell(before, text)

    def end(self) -> str:
        """What was held back; a character without its end becomes a replacement character."""
        return self._tell(self._text(self._read), self._text())

    def _tell(self, before: str, text: str) -> str:
        # what was told stays as context: a tokenizer may strip the space of a first token
        del self._ids[: self._read]
        self._read = len(self._ids)
        return text[len(before) :]

    def _text(self, end: int | None = None) -> str:
        return self._tokenizer.decode(
            self._ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class StopStrings:
    """Cuts a text that comes in pieces before the first of some strings.

    Args:
        strings: not empty each; none at all lets everything through.

    Attributes:
        hit: whether one was found; nothing comes after it.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.hit = False

    def push(self, piece: str) -> str:
        """What can be told: no start of a stop string at its end."""
        if self.hit:
            return ""
        text = self._held + piece
        found = [place for string in self._strings if (place := text.find(string)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back because a stop string might have begun."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that `string` begins with, `string` itself aside."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0


def _byte_alphabet() -> dict[str, int]:
    """Letters of byte-level BPE: printable bytes are themselves, the others follow from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}
