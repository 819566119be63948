"""Files that are read and written in the background, by the threads of `_host`."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from torch import Tensor

from gemma_ext.souping.engine.files.checkpoint import Stored


def check_host() -> None:
    """Raises an ImportError if gemma_ext was built without its host module."""
    try:
        import gemma_ext._host  # noqa: F401
    except ImportError:
        raise ImportError(
            "merging files needs gemma_ext's host module: build with GEMMA_EXT_HOST=ON"
        ) from None


class Disk:
    """Positional reads and writes of many files.

    Args:
        threads: that move bytes.
    """

    def __init__(self, threads: int) -> None:
        from gemma_ext._host import Transfers

        self._transfers = Transfers(threads)
        self._files: dict[tuple[Path, int], int] = {}
        self._asked: list = []

    def read(self, stored: Stored, start: int, to: Tensor, direct: bool = False) -> None:
        """Asks for bytes of a tensor; `asked` hands out what to wait for."""
        if stored.tensor is None:
            transfer = self._transfers.read(
                self._open(stored.path),
                stored.offset + start,
                to.data_ptr(),
                to.numel(),
                self._open_direct(stored.path, os.O_RDONLY) if direct else -1,
            )
        else:
            address = stored.tensor.data_ptr() + start
            transfer = self._transfers.fetch(address, to.data_ptr(), to.numel(), stored.mapped)
        self._asked.append((transfer, stored.path))

    def write(self, path: Path, offset: int, data: Tensor, seed: int) -> None:
        """Writes bytes at an offset; the transfer gives their digest with that seed."""
        transfer = self._transfers.write(
            self._open(path, os.O_RDWR),
            offset,
            data.data_ptr(),
            data.numel(),
            seed,
            self._open_direct(path, os.O_RDWR),
        )
        self._asked.append((transfer, path))

    def copy(self, stored: Stored, path: Path, offset: int) -> None:
        """Copies a whole tensor of a safetensors file."""
        transfer = self._transfers.copy(
            self._open(stored.path),
            stored.offset,
            self._open(path, os.O_RDWR),
            offset,
            stored.nbytes,
        )
        self._asked.append((transfer, path))

    def check(self, path: Path, offset: int, nbytes: int, seed: int) -> None:
        """Reads bytes; the transfer gives their digest with that seed."""
        self._asked.append(
            (self._transfers.check(self._open(path, os.O_RDWR), offset, nbytes, seed), path)
        )

    def asked(self) -> list:
        """Everything asked for since the last call, for `wait`."""
        asked, self._asked = self._asked, []
        return asked

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing touches memory or files any more."""
        self._transfers.close()
        for file in self._files.values():
            if file >= 0:
                os.close(file)
        self._files.clear()

    def _open(self, path: Path, flags: int = os.O_RDONLY) -> int:
        key = (path, flags)
        if key not in self._files:
            self._files[key] = os.open(path, flags)
        return self._files[key]

    def _open_direct(self, path: Path, flags: int) -> int:
        """-1 where the file system knows no way past the page cache."""
        key = (path, flags | os.O_DIRECT)
        try:
            return self._open(*key)
        except OSError:
            self._files[key] = -1
            return -1


def is_over(asked: list) -> bool:
    return all(transfer.done() for transfer, _ in asked)


def wait(asked: list) -> int:
    """Returns once all transfers are over: the sum of their digests modulo 2^64.

    Raises:
        OSError: that ended one, with its file.
    """
    total = 0
    for transfer, path in asked:
        try:
            total += transfer.wait()
        except OSError as error:
            reason = error.strerror
            if error.errno == errno.ENOSPC:
                reason = "the disk is full; make room and run the same merge again, it goes on"
            raise OSError(error.errno, f"{path}: {reason}") from None
    return total % 2**64
