"""Exits that need no head: a learned gate, a hazard, or how far a loop has moved a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ext.ops.depth_batching import head_op
from gemma_ext.ops.depth_batching.head import check_exit
from gemma_ext.ops.depth_batching.inputs import check_like, check_shape, is_reference
from gemma_ext.ops.depth_batching.linear_inputs import check_index, check_storage, per_row
from gemma_ext.reference import depth_batching_head as formulas

MODES = ("gate", "hazard", "cosine", "latent_diff")
STRICT = {"gate": False, "hazard": False, "cosine": True, "latent_diff": True}
"""Whether a score at the threshold itself stays."""
LEARNED = ("gate", "hazard")


class GateExit(NamedTuple):
    """bool [n]; float32 [n]; for a hazard float32 [n], else None."""

    exits: Tensor
    scores: Tensor
    survival: Tensor | None


def gate_exit(
    h: Tensor,
    mode: str,
    threshold: Tensor | float,
    *,
    weight: Tensor | None = None,
    bias: Tensor | float | None = None,
    previous: Tensor | None = None,
    survival: Tensor | None = None,
    last: Tensor | None = None,
    strict: bool | None = None,
    impl: str = "auto",
) -> GateExit:
    """Which of n rows leave after this loop.

    | mode | score | leaves | published as |
    |---|---|---|---|
    | gate | sigmoid(h . w + b) | >= threshold | CALM; FREE, as the difference of two |
    | hazard | 1 - prod over loops of (1 - sigmoid(h . w + b)) | >= threshold | Ouro |
    | cosine | cos(h, previous) | > threshold | CALM |
    | latent_diff | norm(h - previous) / norm(h) | < threshold | Huginn |

    A score of NaN does not leave. No autograd.

    Args:
        h: [n, D] float32, bfloat16 or float16, rows behind this loop.
        mode: above.
        threshold: [n] or one number.
        weight: [D] in the dtype of h, of gate and hazard.
        bias: [1] or one number, theirs too.
        previous: [n, D] like h, the rows before this loop, of cosine and latent_diff.
        survival: float32 [n], of a hazard: 1 before a row's first loop, then what the call before
            gave.
        last: bool [n], rows that leave whatever their score: those at their last loop.
        strict: whether a score at the threshold stays; by default as in the table.
        impl: "auto", or "reference" for plain torch, which also takes float64.

    Raises:
        ValueError, TypeError: what does not fit.
        NotImplementedError: a derivative is asked for.
    """
    reference = is_reference(impl, h, "depth_gate_exit")
    check_shape("h", h, ("n", "D"))
    check_storage("h", h, reference=reference)
    n, width = h.shape
    limit, strict = check_exit(mode, threshold, strict, n, h, modes=MODES, strict_by=STRICT)
    _check_wanted("weight", weight, wanted=mode in LEARNED, mode=mode)
    _check_wanted("previous", previous, wanted=mode not in LEARNED, mode=mode)
    _check_wanted("survival", survival, wanted=mode == "hazard", mode=mode)
    if weight is not None:
        check_shape("weight", weight, (width,))
        check_like("weight", weight, h)
    if bias is not None:
        if mode not in LEARNED:
            raise ValueError(f"expected no bias with mode={mode!r}, got one")
        bias = per_row("bias", bias, 1, h)
    if previous is not None:
        check_shape("previous", previous, (n, width))
        check_like("previous", previous, h)
    if survival is not None:
        survival = per_row("survival", survival, n, h)
    if last is not None:
        check_index("last", last, n, h, torch.bool)
    if reference:
        scores, after = formulas.gate_scores(mode, h, previous, weight, bias, survival)
        exits = formulas.exits_by_gate(mode, scores, limit, last, strict=strict)
    else:
        exits, scores, after = head_op.gate_exit(
            h, previous, weight, bias, survival, limit, last, mode, strict
        )
    return GateExit(exits, scores, after if mode == "hazard" else None)


def _check_wanted(name: str, x: Tensor | None, *, wanted: bool, mode: str) -> None:
    if wanted != (x is not None):
        raise ValueError(
            f"expected {'a' if wanted else 'no'} {name} with mode={mode!r}, "
            f"got {'None' if x is None else 'one'}"
        )
