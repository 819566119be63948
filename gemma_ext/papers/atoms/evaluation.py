"""What a dictionary is worth on states it has not seen, beside a random one.

    faithfulness  R^2 = 1 - sum ||m - m^||^2 / sum ||m - mean||^2     (and about 0; and under S)
    stability     q*  (`windows.stability`)

A random Gaussian dictionary is nearly as incoherent under S as any can be, because whitening makes
it a tight frame: cosines have a standard deviation of sqrt((1 - D / F) / D). A q* near one says
nothing without that control, and nothing without R^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.ops import sae
from gemma_ext.papers.atoms.coherence import Coherence, babel, coherence, unique_up_to
from gemma_ext.papers.atoms.dictionary import Dictionary
from gemma_ext.papers.atoms.windows import stability

BABEL = 64  # K that the cumulative coherence is computed up to


@dataclass(frozen=True)
class Quality:
    """Metrics of one dictionary on held-out states.

    Attributes:
        r2, r2_zero: about the mean of the states, and about zero.
        r2_refit: the first, with codes refitted on the support.
        r2_atomic: the first under S, where every direction of the states counts the same.
        active: mean number of active atoms, L0.
        counts: [K_max + 1] tokens with 0, 1, ... active atoms.
        dead: share of atoms that were never active.
        q_star: of the paper.
        unique: K up to which every code is the only one, by cumulative coherence.
        certain: share of tokens with at most `unique` active atoms.
        coherence: under S.
        spread: largest ratio of two norms under S; the windows are for 1.
    """

    r2: float
    r2_zero: float
    r2_refit: float
    r2_atomic: float
    active: float
    counts: Tensor
    dead: float
    q_star: float
    unique: int
    certain: float
    coherence: Coherence
    spread: float

    def record(self) -> dict[str, float]:
        """The numbers that stand in tables."""
        return {
            "r2": self.r2,
            "r2_zero": self.r2_zero,
            "r2_refit": self.r2_refit,
            "r2_atomic": self.r2_atomic,
            "active": self.active,
            "dead": self.dead,
            "q_star": self.q_star,
            "unique": self.unique,
            "certain": self.certain,
            "mu": self.coherence.largest,
            "mu_99": self.coherence.quantile(0.99),
            "welch": self.coherence.welch,
        }


@torch.no_grad()
def evaluate(dictionary: Dictionary, batches: Sequence[Tensor], refit: bool = True) -> Quality:
    """Measures a dictionary on rows [N, D], which should not be those it was learned from.

    Args:
        refit: also solve for the codes; without it `r2_refit` is nan.

    Raises:
        ValueError: no rows.
    """
    tokens = sum(x.shape[0] for x in batches)
    if tokens == 0:
        raise ValueError("batches: expected at least one row, got none")
    features = dictionary.atoms.shape[0]
    mean = sum(x.double().sum(0) for x in batches) / tokens
    error = refitted = spread = power = white_error = white_spread = 0.0
    counts = torch.zeros(1, dtype=torch.int64)
    fired = torch.zeros(features, dtype=torch.bool, device=dictionary.atoms.device)
    for x in batches:
        codes = dictionary.encode(x)
        residual, centred = _residual(dictionary, x, codes), x.double() - mean
        error += _squares(residual)
        white_error += _squares(dictionary.product.whiten(residual))
        if refit:
            refitted += _squares(_residual(dictionary, x, dictionary.refit(x, codes)))
        spread += _squares(centred)
        white_spread += _squares(dictionary.product.whiten(centred))
        power += _squares(x.double())
        here = torch.bincount(codes.offsets.diff()).cpu()
        counts = _longer(counts, here.numel()) + _longer(here, counts.numel())
        fired[codes.indices.long()] = True
    unit = dictionary.product.unit(dictionary.atoms)
    found = coherence(unit)
    unique = unique_up_to(babel(unit, min(BABEL, features - 1)))
    sizes = torch.arange(counts.numel())
    norms = dictionary.product.norms(dictionary.atoms)
    return Quality(
        r2=1 - error / spread,
        r2_zero=1 - error / power,
        r2_refit=1 - refitted / spread if refit else float("nan"),
        r2_atomic=1 - white_error / white_spread,
        active=float((counts * sizes).sum()) / tokens,
        counts=counts,
        dead=1 - float(fired.double().mean()),
        q_star=stability(found, counts),
        unique=unique,
        certain=float(counts[sizes <= unique].sum()) / tokens,
        coherence=found,
        spread=float(norms.max() / norms.min()),
    )


def recovery(found: Tensor, true: Tensor, threshold: float = 0.9) -> tuple[float, float]:
    """How well known atoms were found: (mean best cosine, share with one above `threshold`).

    Args:
        found: [F, D] and true: [G, D] unit rows, whitened by the same product.
    """
    best = (true @ found.T).amax(1)
    return float(best.mean()), float((best > threshold).double().mean())


def _residual(dictionary: Dictionary, x: Tensor, codes: sae.Codes) -> Tensor:
    return x.double() - dictionary.decode(codes).double()


def _squares(x: Tensor) -> float:
    return float(x.square().sum())


def _longer(counts: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(counts, (0, max(0, size - counts.numel())))
