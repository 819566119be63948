"""Losses of C-AdvUL (2.3) and C-AdvIPO (2.4) as functions of cross-entropies.

    UL   w_t cut(CE(y | x + d), c_t) + w_a cut(-CE(y' | x + d), c_a) + w_u CE(y_u | x_u)
    IPO  (h - 1 / (2 b))^2,  h = [L(y | x + d) - L0(y | x)] - [L(y' | x + d) - L0(y' | x)]

y is the safe answer, y' the harmful one, L the mean log-probability of an answer's tokens and L0
that of the model before training, without d. Beyond c a cut loss keeps a thousandth of its slope:

    cut(l, c) = l  if l > c  else  0.999 c + 0.001 l

which is continuous; the released code has c + 0.001 l, a jump of 0.001 c with the same slope.
"""

from __future__ import annotations

import torch
from torch import Tensor

AWAY_CUTOFF, TOWARD_CUTOFF = -5.0, 0.5
TOKEN_FLOOR = -5.0
_SLOPE = 0.001


def cut(loss: Tensor, cutoff: float, *, reference_compatible: bool = False) -> Tensor:
    """The loss with its slope beyond the cut-off divided by 1000.

    Args:
        loss: of any shape: CE for toward, -CE for away.
        cutoff: c; -inf for none.
        reference_compatible: the form of the released code, with its jump.
    """
    if cutoff == float("-inf"):
        return loss
    held = cutoff if reference_compatible else (1 - _SLOPE) * cutoff
    return torch.where(loss > cutoff, loss, held + _SLOPE * loss)


def ipo(
    safe: Tensor,
    safe_reference: Tensor,
    harmful: Tensor,
    harmful_reference: Tensor,
    beta: float = 0.25,
) -> Tensor:
    """(h - 1 / (2 beta))^2 of each row.

    Args:
        safe, safe_reference, harmful, harmful_reference: [R] mean log-probabilities of a token.

    Raises:
        ValueError: beta not above 0.
    """
    if not beta > 0:
        raise ValueError(f"beta: expected a number above 0, got {beta}")
    h = (safe - safe_reference) - (harmful - harmful_reference)
    return (h - 1 / (2 * beta)).square()


def floored(nll: Tensor, floor: float = TOKEN_FLOOR) -> Tensor:
    """Negative log-likelihoods [N] of which those with log p below the floor count as 0.

    The released code does this to the harmful answer before it takes the mean. A token that falls
    below the floor makes h jump.
    """
    return torch.where(nll > -floor, 0.0, nll)
