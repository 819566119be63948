"""Random numbers of merging and sampling: functions of (key, model, purpose, position) alone.

Philox4x32-10 (Salmon et al., SC 2011), the twin of `csrc/common/random.h`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DROP, ROUND, GENE, NOISE, PICK = range(5)
"""What a random number is for; numbers of different purposes are independent."""
_WORD = 0xFFFFFFFF
_LONG = 0xFFFFFFFFFFFFFFFF


def fnv64(name: str) -> int:
    """FNV-1a of the UTF-8 bytes."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 & _LONG
    return value


def splitmix64(value: int) -> int:
    """One step of SplitMix64 (Steele, Lea, Flood 2014)."""
    value = value + 0x9E3779B97F4A7C15 & _LONG
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _LONG
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _LONG
    return value ^ value >> 31


def random_key(seed: int, name: str) -> int:
    """The 64-bit Philox key of a tensor."""
    return splitmix64(seed & _LONG) ^ fnv64(name)


def _high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Words of the 64-bit product; b int64 below 2^32."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    total = (high & 0xFFFF) * 65536 + low
    return (high >> 16) + (total >> 32), total & _WORD


def philox(key: int, counter: Sequence[Tensor]) -> list[Tensor]:
    """Four words (int64 below 2^32) for each counter of four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, key >> 32
    for _ in range(10):
        (h0, l0), (h1, l1) = _high_low(0xD2511F53, c0), _high_low(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return [c0, c1, c2, c3]


def random_words(key: int, model: int, purpose: int, offset: int, n: int) -> Tensor:
    """[n] int64 below 2^32, of positions offset .. offset + n: word position % 4 of the counter
    (position / 4, model, purpose)."""
    at = torch.arange(offset, offset + n)
    quad = at // 4
    same = torch.zeros_like(quad)
    words = philox(key, [quad & _WORD, quad >> 32, same + model, same + purpose])
    return torch.stack(words, -1).gather(-1, (at % 4).unsqueeze(-1)).squeeze(-1)


def uniforms(key: int, model: int, purpose: int, offset: int, n: int) -> Tensor:
    """[n] float64, multiples of 2^-24 in [0, 1)."""
    return (random_words(key, model, purpose, offset, n) >> 8).double() * 2.0**-24


def normals(key: int, model: int, offset: int, n: int) -> Tensor:
    """[n] float64 standard normal by Box and Muller: positions 2i, 2i + 1 are a pair, cosine first,
    of two uniforms at their places; the first is moved by half a step, away from 0."""
    first = offset - offset % 2
    u = uniforms(key, model, NOISE, first, n + offset - first + (offset + n) % 2)
    radius = (-2 * (u[0::2] + 2.0**-25).log()).sqrt()
    angle = 2 * math.pi * u[1::2]
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten()
    return pairs[offset - first :][:n]
