"""Five domains of the corpus that read differently, for experts to be made of and merged again.

| domain      | text                                                              |
|-------------|-------------------------------------------------------------------|
| prose       | docstrings of all modules that are in no other domain             |
| manual      | the reference manual of the language, as `help()` prints it       |
| network     | code of e-mail, HTTP, URLs, RPC and their protocols               |
| gui         | code of windows, editors and turtles                              |
| concurrency | code of event loops, threads and processes                        |

A document is cut into pieces of a few kilobytes at line ends; the hash of a piece says whether it
is for training, validation or test, a tenth each for the latter two: no text is on two sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.pocket.corpus import Document, documents
from gemma_ext.pocket.tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CODE = {
    "network": (
        "email http urllib xmlrpc wsgiref html socketserver.py mailbox.py imaplib.py smtplib.py "
        "smtpd.py nntplib.py poplib.py ftplib.py telnetlib.py ssl.py socket.py netrc.py "
        "webbrowser.py mimetypes.py ipaddress.py uuid.py"
    ),
    "gui": "idlelib tkinter turtle.py turtledemo",
    "concurrency": (
        "asyncio multiprocessing concurrent threading.py subprocess.py queue.py sched.py "
        "selectors.py signal.py asyncore.py asynchat.py pty.py"
    ),
}
DOMAINS = ("prose", "manual", *_CODE)
_PIECE = 4096  # characters
_TENTH = 26  # of 256


@dataclass(frozen=True)
class DomainText:
    """Token streams of one domain, [n] int64 each, no text in two of them."""

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor


def load_domain(name: str, tokenizer: PreTrainedTokenizerFast) -> DomainText:
    """A domain of the corpus as streams of token ids [n] int64: train, validation and test.

    Args:
        name: one of `DOMAINS`.
        tokenizer: of the pocket that reads them.

    Raises:
        ValueError: `name` is none of `DOMAINS`.
    """
    if name not in DOMAINS:
        raise ValueError(f"domain: expected one of {', '.join(DOMAINS)}, got {name!r}")
    sides: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for doc in documents():
        if domain_of(doc) == name:
            for piece in pieces(doc.text):
                sides[_side(piece)].append(piece)
    streams = {side: torch.tensor(encode(tokenizer, texts)) for side, texts in sides.items()}
    return DomainText(name, **streams)


def domain_of(doc: Document) -> str | None:
    """The domain of a document, or None for code of no domain."""
    top = doc.path.split("/")[0]
    if top == "pydoc_data":
        return "manual"
    owner = next((name for name, places in _CODE.items() if top in places.split()), None)
    if doc.kind == "prose":
        return "prose" if owner is None else None
    return owner


def pieces(text: str) -> Iterator[str]:
    """Cuts a text at line ends into pieces of about 4 kB; together they are the text."""
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= _PIECE:
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)


def _side(piece: str) -> str:
    mark = hashlib.sha256(piece.encode()).digest()[-1]
    if mark < _TENTH:
        return "test"
    return "validation" if mark < 2 * _TENTH else "train"
