"""Answers of a model on disk: what an interrupted call has finished is not computed again."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gemma_ext.progress import progress_bar

Answer = TypeVar("Answer")
_KEYS_PER_QUERY = 500  # below sqlite's limit of variables


class Store:
    """A table from a digest of (model, question) to an answer, in one sqlite file.

    What `put` has returned for survives the death of the process; several processes may share a
    file, and several threads a store.

    Args:
        path: of the file; made with its folder if it is not there.

    Raises:
        ValueError: the file is no store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self.path, timeout=60.0, check_same_thread=False)
        self._lock = threading.Lock()
        try:
            with self._db:
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, value TEXT)"
                    " WITHOUT ROWID"
                )
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path}: expected a cache of answers, got {error}") from None

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """The answers there are to `keys`."""
        found = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            some = keys[start : start + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(some))
            query = f"SELECT key, value FROM answers WHERE key IN ({marks})"
            with self._lock:
                rows = self._db.execute(query, some).fetchall()
            found.update((key, json.loads(value)) for key, value in rows)
        return found

    def put(self, answers: Iterable[tuple[bytes, Any]]) -> None:
        """Write answers, all of them or none."""
        rows = [(key, json.dumps(value)) for key, value in answers]
        with self._lock, self._db:
            self._db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def close(self) -> None:
        self._db.close()


def key_of(model: str, question: Any) -> bytes:
    """Digest of a question, which is made of what JSON knows, to a model."""
    text = json.dumps([model, question], separators=(",", ":"), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=20).digest()


def answer(
    questions: Sequence[Any],
    work: Callable[[list[int]], Iterator[list[tuple[int, Answer]]]],
    decode: Callable[..., Answer],
    *,
    store: Store | None,
    model: Callable[[], str],
    title: str,
    show_progress: bool,
) -> list[Answer]:
    """The answers to `questions`, from the store or from `work`, each question answered once.

    Args:
        questions: made of what JSON knows.
        work: answers the questions at the given places; yields (place, answer) pairs in groups,
            each of which is stored as it comes.
        decode: makes an answer of what `vars` gave of one.
        model: what the answers depend on besides the question; called if there is a store.
    """
    name = model() if store else ""
    keys = [key_of(name, question) for question in questions]
    known = {}
    if store:
        known = {key: decode(*value) for key, value in store.get(list(set(keys))).items()}
    missing = [place for key, place in first_places(keys).items() if key not in known]
    with progress_bar(title, len(missing), show_progress and bool(missing)) as advance:
        for group in work(missing) if missing else ():
            if store:
                store.put((keys[place], list(vars(found).values())) for place, found in group)
            known.update((keys[place], found) for place, found in group)
            advance(len(group))
    return [known[key] for key in keys]


def first_places(keys: Sequence[bytes]) -> dict[bytes, int]:
    """Where each key is met first."""
    places: dict[bytes, int] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, place)
    return places
