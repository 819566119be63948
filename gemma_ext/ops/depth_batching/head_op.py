"""The ops of the head, its noise and gates as torch sees them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ext.ops._derivatives import refuse_derivatives

HEAD_MODES = (None, "max_prob", "margin", "entropy")
GATE_MODES = ("gate", "hazard", "cosine", "latent_diff")
_ops = torch.ops.gemma_ext
_REMEDY = "it serves; the same function with impl='reference' has derivatives"


class Logits(NamedTuple):
    """softcap(logit_scale norm(h) W^T + bias) of rows h, as `head_exit` has it."""

    weight: Tensor
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    eps: float = 1e-6
    plus_one: bool = False
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def numbers(self) -> tuple[float, bool, float, float]:
        return self.eps, self.plus_one, self.softcap or 0.0, self.logit_scale


def head_exit(
    h: Tensor,
    logits: Logits,
    threshold: Tensor | None,
    temperature: Tensor | None,
    keys: Tensor | None,
    mode: str | None,
    strict: bool,
    candidates: int,
    skip: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """ids, top, lse, entropy, exits, samples, tempered, values, indices; empty where not wanted.

    Nothing is said of rows of `skip`, bool [n], which cards leave out.
    """
    return _ops.depth_head_exit(
        *(h, logits.norm_weight, logits.weight, logits.bias),
        *(threshold, temperature, keys, skip, *logits.numbers),
        *(HEAD_MODES.index(mode), strict, candidates),
    )


def gumbel(ids: Tensor, keys: Tensor) -> Tensor:
    return _ops.depth_gumbel(ids, keys)


def gate_exit(
    h: Tensor,
    previous: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    survival: Tensor | None,
    threshold: Tensor,
    last: Tensor | None,
    mode: str,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """exits, scores, survival."""
    return _ops.depth_gate_exit(
        h, previous, weight, bias, survival, threshold, last, GATE_MODES.index(mode), strict
    )


def shortlist(
    h: Tensor, logits: Logits, codes: Tensor, scale: Tensor, slack: Tensor, candidates: int
) -> tuple[Tensor, ...]:
    """ids, top, rest, low, high."""
    return _ops.depth_shortlist(
        *(h, logits.norm_weight, logits.weight, logits.bias, codes, scale, slack),
        *(*logits.numbers, candidates),
    )


for _name in ("depth_head_exit", "depth_gumbel", "depth_gate_exit", "depth_shortlist"):
    refuse_derivatives(_name, _REMEDY)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _ids(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("gemma_ext::depth_head_exit")
def _head_fake(
    h, norm_weight, weight, bias, threshold, temperature, keys, skip, eps, plus_one, softcap,
    logit_scale, mode, strict, candidates,
):  # fmt: skip
    n = h.shape[0]
    drawn = 0 if temperature is None else n
    exits = h.new_empty(0 if threshold is None else n, dtype=torch.bool)
    return (
        _ids(h, n),
        _floats(h, n, 2),
        _floats(h, n),
        _floats(h, n),
        exits,
        _ids(h, drawn),
        _floats(h, drawn),
        _floats(h, n, candidates),
        _ids(h, n, candidates),
    )


@torch.library.register_fake("gemma_ext::depth_gumbel")
def _gumbel_fake(ids, keys):
    return _floats(ids, *ids.shape)


@torch.library.register_fake("gemma_ext::depth_gate_exit")
def _gate_fake(h, previous, weight, bias, survival, threshold, last, mode, strict):
    n = h.shape[0]
    after = _floats(h, 0 if survival is None else n)
    return h.new_empty(n, dtype=torch.bool), _floats(h, n), after


@torch.library.register_fake("gemma_ext::depth_shortlist")
def _shortlist_fake(h, *rest):
    n = h.shape[0]
    return _ids(h, n), _floats(h, n, 2), _floats(h, n), _floats(h, n), _floats(h, n)
