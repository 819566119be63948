"""Which latents fire on toxic text and not on clean text.

    m_bj = max_t f_tj over the tokens of sequence b          (pooling "max"; "mean": mean_t f_tj)
    delta_j = mean_{b toxic} m_bj - mean_{b clean} m_bj
    t_j = delta_j / sqrt(var_toxic / n_toxic + var_clean / n_clean)      Welch's
    M_j = max over all tokens of f_tj                        the reference scale of steering

Sums are taken from the short lists of active latents: no [N, F], and [F] numbers are all that stays
between batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.ops.sae import Codes

POOLINGS = ("max", "mean")
GENERAL = 0.10  # of the clean tokens: a latent that fires on more says nothing of toxicity (ours)


@dataclass(frozen=True)
class Found:
    """Latents in the order of their score.

    Attributes:
        latents: int64 [R].
        delta, t: float64 [R], of the pooling they were chosen by.
        clean_rate: float64 [R], share of the clean tokens they fire on.
        reference: float32 [R], the largest activation seen, M_j.
    """

    latents: Tensor
    delta: Tensor
    t: Tensor
    clean_rate: Tensor
    reference: Tensor


class LatentContrast:
    """Running statistics of F latents over toxic and clean sequences."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        if features < 1:
            raise ValueError(f"features: expected at least 1, got {features}")
        self.features = features
        # [pooling, class, F]; class 1 is toxic
        self.sums = torch.zeros(2, 2, features, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.sums)
        self.fired = torch.zeros(2, features, dtype=torch.int64, device=device)
        self.largest = torch.zeros(features, device=device)
        self.sequences, self.tokens = [0, 0], [0, 0]

    def add(self, codes: Codes, lengths: Tensor, toxic: Tensor) -> None:
        """Counts B sequences that lie one behind the other in the tokens of `codes`.

        Args:
            codes: of all tokens; entries that are not positive do not fire.
            lengths: int64 [B], tokens of each sequence, at least 1.
            toxic: bool [B].

        Raises:
            ValueError: shapes that do not fit.
        """
        if codes.features != self.features:
            raise ValueError(f"codes: expected {self.features} features, got {codes.features}")
        if lengths.ndim != 1 or toxic.shape != lengths.shape:
            raise ValueError(
                f"toxic: expected [B] like lengths {list(lengths.shape)}, got {list(toxic.shape)}"
            )
        if int(lengths.sum()) != codes.tokens or (lengths < 1).any():
            raise ValueError(
                f"lengths: expected positive ones that sum to {codes.tokens} tokens, "
                f"got {int(lengths.sum())}"
            )
        sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        active = codes.mask & (codes.values > 0)
        values = codes.values.detach()[active]
        latents = codes.indices[active].long()
        owners = sequence[codes.rows()[active]]
        kinds = toxic.long()
        self.fired.view(-1).index_add_(
            0, kinds[owners] * self.features + latents, torch.ones_like(latents)
        )
        self.largest.scatter_reduce_(0, latents, values, "amax")
        keys, places = torch.unique(owners * self.features + latents, return_inverse=True)
        who, what = keys // self.features, keys % self.features
        pooled = (
            values.new_zeros(len(keys)).scatter_reduce(0, places, values, "amax").double(),
            values.new_zeros(len(keys), dtype=torch.float64).index_add(0, places, values.double())
            / lengths[who],
        )
        for at, pool in enumerate(pooled):
            cell = kinds[who] * self.features + what
            self.sums[at].view(-1).index_add_(0, cell, pool)
            self.squares[at].view(-1).index_add_(0, cell, pool * pool)
        for kind in (0, 1):
            self.sequences[kind] += int((kinds == kind).sum())
            self.tokens[kind] += int(lengths[kinds == kind].sum())

    def contrast(self, pooling: str = "max") -> tuple[Tensor, Tensor]:
        """delta and t, float64 [F] each; t is 0 where nothing varies.

        Raises:
            ValueError: an unknown pooling, or fewer than two sequences of a class.
        """
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected max or mean, got {pooling!r}")
        if min(self.sequences) < 2:
            raise ValueError(
                "sequences: expected two or more of each class, "
                f"got {self.sequences[0]} clean and {self.sequences[1]} toxic"
            )
        at = POOLINGS.index(pooling)
        n = torch.tensor(self.sequences, dtype=torch.float64, device=self.sums.device)[:, None]
        mean = self.sums[at] / n
        variance = (self.squares[at] / n - mean**2).clamp_min(0) * n / (n - 1)
        delta = mean[1] - mean[0]
        error = (variance / n).sum(0).sqrt()
        return delta, torch.where(error > 0, delta / error.clamp_min(1e-300), 0.0)

    @property
    def clean_rate(self) -> Tensor:
        """float64 [F], share of the clean tokens that each latent fires on."""
        return self.fired[0].double() / max(self.tokens[0], 1)

    def best(self, count: int = 20, *, pooling: str = "max", general: float = GENERAL) -> Found:
        """The latents of the largest delta among those that clean text seldom fires.

        Raises:
            ValueError: no latent fires more on toxic than on clean text.
        """
        delta, t = self.contrast(pooling)
        open_ = (self.clean_rate <= general) & (delta > 0)
        if not open_.any():
            raise ValueError("codes: expected a latent that toxic text fires more, got none")
        scores = torch.where(open_, delta, -torch.inf)
        latents = torch.sort(scores, descending=True, stable=True).indices
        latents = latents[: min(count, int(open_.sum()))]
        return Found(
            latents, delta[latents], t[latents], self.clean_rate[latents], self.largest[latents]
        )
