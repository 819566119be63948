"""Element rules of one model against a base.

nearswap       w = clamp(t / max(|delta|, 1e-6), 0, 1), out = theta_0 + w delta: what is near moves
               all the way, what is far moves by t
arcee_fusion   importance |delta_i| KL(softmax(row of theta_1) || softmax(row of theta_0)), 1e-8 on
               the probabilities; out = theta_0 + delta where it reaches q2 + 1.5 (q3 - q1), the
               quartiles of the tensor

mergekit takes the quartiles of a random million; here they are those of all elements, found by
counting, so that they neither depend on a draw nor on how the tensor is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.ops.souping import Magnitudes, Part, nearswap_, soup_
from gemma_ext.souping.method import Method, Parameter, TensorInfo, Values

_EPS = 1e-8
_PIECE = 1 << 16  # elements: 256 KiB in float32
_QUARTERS = (0.25, 0.5, 0.75)


class NearSwap(Method):
    """Moves at most t towards the other model, and all the way where it is nearer."""

    name = "nearswap"
    base = "needed"
    models = (1, 1)
    parameters = (Parameter("t"),)

    def merge(self, part: Part, state: Values) -> None:
        nearswap_([part], state.merge["t"])


@dataclass
class State:
    """One tensor between the calls for it."""

    tensor: TensorInfo
    magnitudes: Magnitudes
    threshold: float = 0.0


class ArceeFusion(Method):
    """Takes over the elements whose change matters most."""

    name = "arcee_fusion"
    base = "needed"
    models = (1, 1)
    grain = "row"
    surveys = 2

    def begin(self, tensor: TensorInfo, values: Values) -> State:
        return State(tensor, Magnitudes(1, cuts=len(_QUARTERS)))

    def survey(self, step: int, part: Part, state: State) -> None:
        for piece in _pieces(part):
            state.magnitudes.survey([Part([importance(piece)])])

    def settle(self, step: int, state: State) -> None:
        n = int(state.magnitudes.counts)
        # the element at place floor(q (n - 1)) from the smallest up
        state.magnitudes.settle([[n - int(q * (n - 1)) for q in _QUARTERS]])
        if step == 1 and n:
            cuts = [state.magnitudes.cut(i).bits for i in range(len(_QUARTERS))]
            low, middle, high = (float(bits.view(torch.float32)) for bits in cuts)
            state.threshold = middle + 1.5 * (high - low)

    def merge(self, part: Part, state: State) -> None:
        for piece in _pieces(part):
            taken = torch.where(importance(piece) >= state.threshold, *_both(piece))
            soup_([Part([taken], None, piece.out, piece.name, piece.offset)], 1.0)


def _pieces(part: Part) -> Iterator[Part]:
    """Runs of whole rows that a cache holds, so that softmaxes need little memory."""
    x, base, out = part.sources[0], part.base, part.out
    if x.dim() < 2:
        yield part
        return
    width = x[0].numel()
    step = max(1, _PIECE // max(1, width))
    for row in range(0, len(x), step):
        rows = slice(row, row + step)
        written = None if out is None else out[rows]
        yield Part([x[rows]], base[rows], written, part.name, part.offset + row * width)


def importance(part: Part) -> Tensor:
    """float32 like the part: |delta| times the divergence of its row."""
    theirs, ours = (x.float() for x in _both(part))
    p, q = theirs.softmax(-1) + _EPS, ours.softmax(-1) + _EPS
    divergence = (p * (p / q).log()).sum(-1, keepdim=True)
    return (theirs - ours).abs() * divergence


def _both(part: Part) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(part.sources[0].dtype, part.base.dtype)
    return part.sources[0].to(dtype), part.base.to(dtype)
