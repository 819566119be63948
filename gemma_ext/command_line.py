"""How a command of `gemma-ext` ends that cannot do its work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_sentence(command: str) -> Iterator[None]:
    """Errors of the input as one sentence on stderr, with exit status 1; 130 after Ctrl-C.

    Args:
        command: as it was typed, such as "sae train".
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"gemma-ext {command}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what was saved", file=sys.stderr)
        raise SystemExit(130) from None
