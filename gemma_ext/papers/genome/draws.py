"""Random decisions that depend on their place alone: (seed, generation, stage, who)."""

from __future__ import annotations

import hashlib

import numpy as np


def draws(seed: int, *place: int | str) -> np.random.Generator:
    """Philox numbers of one decision; no other decision shares or shifts them."""
    digest = hashlib.sha256(repr((int(seed), *place)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def seed_of(seed: int, *place: int | str) -> int:
    """A seed below 2^63 for a kernel's random numbers."""
    digest = hashlib.sha256(repr((int(seed), *place)).encode()).digest()
    return int.from_bytes(digest[16:24], "little") >> 1
