"""How a dictionary chooses its active latents: one small frozen object per variant.

| object    | active latents of a token                                    | value    |
|-----------|--------------------------------------------------------------|----------|
| ReLU      | p > 0                                                        | p        |
| TopK      | the k best scores                                            | relu(p)  |
| AbsTopK   | the k largest magnitudes                                     | p        |
| GroupMax  | the best of each of k groups                                 | relu(p)  |
| BatchTopK | training: the N*k best of the batch; afterwards: above a mean threshold | p |
| JumpReLU  | p > threshold of the latent                                  | p        |
| Gated     | gate > 0                                                     | relu(magnitude) |

Scores are p, or p times the norm of the latent's decoder where the dictionary says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.nn.sparse_autoencoder.jump import jump
from gemma_ext.ops.sae import (
    Codes,
    encode_batch_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
)

if TYPE_CHECKING:
    from gemma_ext.nn.sparse_autoencoder.module import SparseAutoencoder

Second = tuple[Tensor, int]  # mask [F] of the latents of a second list, and its length


@dataclass(frozen=True)
class Latents:
    """What an encoder found in N tokens.

    Attributes:
        codes: the active latents with their values f, for the decoder.
        pre: the same entries with their raw pre-activations p.
        second: raw pre-activations of the best latents among a mask, [N, k]; None if not asked for.
        wide: values of the longer list of Multi-TopK; None without it.
        min_positive: [] smallest positive score that was kept; BatchTopK in training only.
    """

    codes: Codes
    pre: Codes
    second: Codes | None = None
    wide: Codes | None = None
    min_positive: Tensor | None = None


@dataclass(frozen=True)
class Activation(ABC):
    """Base of all variants."""

    def parameters(self, features: int) -> Mapping[str, Tensor]:
        """Parameters of the dictionary that belong to the variant, freshly initialised."""
        return {}

    def buffers(self, features: int) -> Mapping[str, Tensor]:
        """Its state that is no parameter."""
        return {}

    @abstractmethod
    def latents(
        self, sae: SparseAutoencoder, x: Tensor, bias: Tensor, second: Second | None
    ) -> Latents:
        """Active latents of x [..., M*D], centred and standardised."""

    def observe(self, sae: SparseAutoencoder, latents: Latents) -> None:  # noqa: B027
        """Learn from the selection of a training step."""

    def _refuse(self, second: Second | None) -> None:
        if second is not None:
            raise ValueError(f"second: expected None with {type(self).__name__}, got a mask")


@dataclass(frozen=True)
class ReLU(Activation):
    """f = relu(p)."""

    def latents(self, sae, x, bias, second):
        found = encode_threshold(x, sae.encoder, bias, threshold=0.0, aux=second)
        return Latents(found.codes, found.codes, found.aux)


@dataclass(frozen=True)
class TopK(Activation):
    """The k best scores of a token (arXiv 2406.04093).

    Args:
        k: active latents.
        multi: in training, the list of Multi-TopK has multi * k entries; 1 for none.
        relu: values below 0 are not active; False keeps them (OpenAI's Identity).
    """

    k: int
    multi: int = 1
    relu: bool = True

    def __post_init__(self) -> None:
        _at_least(1, k=self.k, multi=self.multi)

    def latents(self, sae, x, bias, second):
        longer = self.k * self.multi if sae.training else self.k
        found = encode_topk(x, sae.encoder, bias, k=longer, scale=sae.score_scale(), aux=second)
        values = found.codes.values
        codes = found.codes.with_values(values.relu() if self.relu else values)
        if longer == self.k:
            return Latents(codes, found.codes, found.aux)
        first = [_prefix(c, self.k) for c in (codes, found.codes)]
        return Latents(*first, second=found.aux, wide=codes)


@dataclass(frozen=True)
class AbsTopK(Activation):
    """The k largest magnitudes of a token, with their signs (arXiv 2510.00404)."""

    k: int

    def __post_init__(self) -> None:
        _at_least(1, k=self.k)

    def latents(self, sae, x, bias, second):
        found = encode_topk(
            x,
            sae.encoder,
            bias,
            k=self.k,
            scale=sae.score_scale(),
            by="magnitude",
            aux=second,
        )
        return Latents(found.codes, found.codes, found.aux)


@dataclass(frozen=True)
class GroupMax(Activation):
    """The best latent of each of k contiguous groups; k divides the number of latents."""

    k: int

    def __post_init__(self) -> None:
        _at_least(1, k=self.k)

    def latents(self, sae, x, bias, second):
        self._refuse(second)
        pre = encode_group_max(x, sae.encoder, bias, groups=self.k)
        return Latents(pre.with_values(pre.values.relu()), pre)


@dataclass(frozen=True)
class BatchTopK(Activation):
    """The N*k best positive scores of the batch (arXiv 2412.06410).

    Outside of training a latent is active where its score exceeds `threshold`, the running mean of
    the smallest score that was kept. The first value is taken as it is, so that the mean starts
    unbiased; before it every positive score is active.

    Args:
        k: mean number of active latents per token; the batch keeps int(k * N).
        decay: of the running mean.
    """

    k: float
    decay: float = 0.99

    def __post_init__(self) -> None:
        if not isinstance(self.k, (int, float)):
            raise TypeError(f"k: expected a number, got {type(self.k).__name__}")
        if not self.k > 0:
            raise ValueError(f"k: expected a positive number, got {self.k}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {self.decay}")

    def buffers(self, features):
        return {"threshold": torch.tensor(-1.0)}

    def latents(self, sae, x, bias, second):
        scale = sae.score_scale()
        if not sae.training:
            threshold = sae.threshold.clamp(min=0).expand(sae.features)
            found = encode_threshold(
                x, sae.encoder, bias, threshold=threshold, scale=scale, aux=second
            )
            return Latents(found.codes, found.codes, found.aux)
        total = int(self.k * (x.numel() // x.shape[-1]))
        found = encode_batch_topk(x, sae.encoder, bias, total=total, scale=scale, aux=second)
        return Latents(found.codes, found.codes, found.aux, min_positive=found.min_positive)

    @torch.no_grad()
    def observe(self, sae, latents):
        least, mean = latents.min_positive.to(sae.threshold.dtype), sae.threshold
        moved = torch.where(mean < 0, least, mean + (1 - self.decay) * (least - mean))
        sae.threshold.copy_(torch.where(least.isfinite(), moved, mean))


@dataclass(frozen=True)
class JumpReLU(Activation):
    """p where it exceeds the latent's threshold (arXiv 2407.14435).

    Thresholds are parameters in float32 whatever the dtype of the weights is, and are trained
    directly, not through their logarithm.

    Args:
        bandwidth: of the straight-through estimators.
        initial: threshold to start from.
        inclusive: p = threshold is active too.
        to_input: see `jump`.
    """

    bandwidth: float = 0.05
    initial: float = 0.01
    inclusive: bool = False
    to_input: bool = False

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth: expected a positive number, got {self.bandwidth}")

    def parameters(self, features):
        return {"threshold": torch.full((features,), self.initial)}

    def latents(self, sae, x, bias, second):
        found = encode_threshold(
            x,
            sae.encoder,
            bias,
            threshold=sae.threshold.detach(),
            inclusive=self.inclusive,
            margin=self.bandwidth / 2 if sae.training else 0,
            aux=second,
        )
        if not sae.training:
            return Latents(found.codes, found.codes, found.aux)
        values = jump(
            found.codes.values,
            sae.threshold[found.codes.indices.long()],
            self.bandwidth,
            inclusive=self.inclusive,
            to_input=self.to_input,
        )
        return Latents(found.codes.with_values(values), found.codes, found.aux)


@dataclass(frozen=True)
class Gated(Activation):
    """relu(m) where the gate is open (arXiv 2404.16014).

    Gate and magnitude share one product: with the gate's pre-activation p = q + encoder_bias, the
    magnitude is m = q * exp(r_mag) + magnitude_bias.
    """

    def parameters(self, features):
        return {"r_mag": torch.zeros(features), "magnitude_bias": torch.zeros(features)}

    def latents(self, sae, x, bias, second):
        found = encode_threshold(x, sae.encoder, bias, threshold=0.0, aux=second)
        where = found.codes.indices.long()
        product = found.codes.values - sae.encoder_bias[where]
        values = (product * sae.r_mag.exp()[where] + sae.magnitude_bias[where]).relu()
        return Latents(found.codes.with_values(values), found.codes, found.aux)


def _prefix(codes: Codes, k: int) -> Codes:
    return replace(codes, values=codes.values[:, :k], indices=codes.indices[:, :k].contiguous())


def _at_least(least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
