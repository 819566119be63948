"""Which tensors of an unfinished output are done: a line of JSON each, appended once they are.

A process that is killed leaves at most a torn last line. Digests tell after a loss of power which
of the tensors never reached the disk.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "merge.journal"


@dataclass(frozen=True)
class Done:
    """A tensor that was written.

    Attributes:
        name: of it.
        step: bytes of a piece, the last may be shorter.
        digest: sum modulo 2^64 of the pieces' XXH64, each seeded with its first byte's position.
    """

    name: str
    step: int
    digest: int


class Journal:
    """The journal of a folder, locked against other processes while it is open.

    Args:
        folder: of the unfinished output.
        key: of everything the output depends on; lines of another key do not count.

    Attributes:
        done: tensors that an earlier process wrote, by name.

    Raises:
        OSError: another process holds it, or it cannot be written.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._file = (folder / NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise BlockingIOError(f"{folder}: another process is writing this merge") from None
        self._file.seek(0)
        self.done = _parse(self._file.read(), key)
        # anew and whole, so that lines never follow a torn one
        self._file.truncate(0)
        self._write({"key": key})
        for done in self.done.values():
            self.add(done)

    def add(self, done: Done) -> None:
        self._write(asdict(done))

    def forget(self, name: str) -> None:
        del self.done[name]

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _parse(text: str, key: str) -> dict[str, Done]:
    """What whole lines say, up to the first that is not one."""
    first, *lines = text.split("\n")
    found: dict[str, Done] = {}
    if first != json.dumps({"key": key}):
        return found
    for line in lines:
        try:
            done = Done(**json.loads(line))
        except (ValueError, TypeError):
            break
        found[done.name] = done
    return found


def remove(folder: Path) -> None:
    os.unlink(folder / NAME)
