"""Second moments of hidden states, streamed: the estimator behind the atomic inner product.

    raw      E[m m']                      the paper's
    centred  E[(m - E m)(m - E m)']       without the rank-one part that non-negative codes bring

Every batch is summed about its own mean and merged into a float64 total (Chan, Golub, LeVeque), so
that a mean far above the deviation costs no digits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

KINDS = ("raw", "centred")


class Moments:
    """Count, mean and second moment of all rows seen so far.

    Attributes:
        count: rows.
        mean: [D] float64.
        scatter: [D, D] float64, the sum of (m - mean)(m - mean)'.

    Example:
        >>> moments = Moments(640)
        >>> for batch in batches:
        ...     moments.add(batch)
        >>> product = atomic_product(moments.matrix("centred"))
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x: Tensor, tile: int = 4096) -> None:
        """Takes rows [..., D] in; products are float32 within a tile, float64 for float64 rows.

        Raises:
            ValueError: another width.
        """
        width = self.mean.numel()
        if x.shape[-1] != width:
            raise ValueError(f"x: expected rows of {width}, got {x.shape[-1]}")
        if x.numel() == 0:
            return
        for rows in x.reshape(-1, width).split(tile):
            exact = rows.double()
            mean, count = exact.mean(0), rows.shape[0]
            centred = exact - mean
            if rows.dtype != torch.float64:
                centred = centred.float()
            gap, total = mean - self.mean, self.count + count
            self.scatter += (centred.T @ centred).double()
            self.scatter += torch.outer(gap, gap) * (self.count * count / total)
            self.mean += gap * (count / total)
            self.count = total

    def matrix(self, kind: str = "centred") -> Tensor:
        """[D, D] float64 moment.

        Args:
            kind: "centred" or "raw".

        Raises:
            ValueError: unknown kind, or no rows yet.
        """
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if self.count == 0:
            raise ValueError("moments: expected at least one row, got none")
        centred = self.scatter / self.count
        return centred if kind == "centred" else centred + torch.outer(self.mean, self.mean)


def load_mom2(path: Path | str) -> tuple[Tensor, int]:
    """Raw moment and count of a file of knowledge-editing code (`mom2`, a numpy archive).

    The archive holds the sum over samples and their count. Its vectors are inputs of an MLP's
    output projection, which need not have the width of the hidden state.

    Returns:
        ([D, D] float64 E[k k'], count).

    Raises:
        ValueError: an array is missing, or the sum is not square.
    """
    import numpy

    with numpy.load(path) as archive:
        if missing := {"mom2.mom2", "mom2.count"} - set(archive.files):
            raise ValueError(f"{path}: expected arrays mom2.mom2 and mom2.count, no {missing}")
        total, count = torch.from_numpy(archive["mom2.mom2"]), int(archive["mom2.count"])
    if total.dim() != 2 or total.shape[0] != total.shape[1] or count < 1:
        raise ValueError(
            f"{path}: expected a square sum over at least one sample, "
            f"got {list(total.shape)} over {count}"
        )
    return total.double() / count, count
