"""Tokens to text while they come: pieces that are never taken back, and strings that end it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
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
        # a special token is no text and must not be all the context there is
        near = (id for id in reversed(context) if not self._special(id))
        self._ids = list(islice(near, 4))[::-1]
        self._read = len(self._ids)
        # a character that the context leaves open is told when it is complete
        while self._read and self._text(self._read).endswith(_REPLACEMENT):
            self._read -= 1

    def push(self, token: int) -> str:
        """What can be told after one more token; empty within a character."""
        if self._special(token):
            return ""
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

    def _special(self, token: int) -> bool:
        decode = self._tokenizer.decode
        return not decode([token], skip_special_tokens=True) and bool(
            decode([token], skip_special_tokens=False)
        )

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
        self._matches = [_Match(string) for string in strings]
        self._held = ""
        self.hit = False

    def push(self, piece: str) -> str:
        """What can be told: no start of a stop string at its end."""
        if self.hit:
            return ""
        text = self._held + piece
        for place, letter in enumerate(piece, len(self._held) + 1):
            found = [len(match.string) for match in self._matches if match.advance(letter)]
            if found:
                self.hit, self._held = True, ""
                return text[: place - max(found)]
        keep = max((match.length for match in self._matches), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back because a stop string might have begun."""
        held, self._held = self._held, ""
        return held


class _Match:
    """How much of the start of a string stands at the end of a text, letter by letter.

    Knuth, Morris and Pratt; the borders are found as far as the text ever reached, so that all of
    it takes time in proportion to the text and none to the string.
    """

    def __init__(self, string: str) -> None:
        self.string, self.length = string, 0
        self._borders = [0, 0]  # of each start: its longest end that is a start, too

    def advance(self, letter: str) -> bool:
        """Whether the string is complete with this letter; nothing is to come after that."""
        self.length = self._longer(self.length, letter)
        if self.length == len(self._borders):
            border = self._borders[-1]
            self._borders.append(self._longer(border, letter))
        return self.length == len(self.string)

    def _longer(self, length: int, letter: str) -> int:
        while length and self.string[length] != letter:
            length = self._borders[length]
        return length + (self.string[length] == letter)


def _byte_alphabet() -> dict[str, int]:
    """Letters of byte-level BPE: printable bytes are themselves, the others follow from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}
