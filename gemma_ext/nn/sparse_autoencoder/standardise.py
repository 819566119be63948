"""What happens to an activation before the encoder sees it, and how a reconstruction goes back.

| kind       | z                               | back         | elsewhere                        |
|------------|---------------------------------|--------------|----------------------------------|
| none       | x                               |              |                                  |
| layer_norm | (x - mean) / (std + 1e-5)       | z std + mean | OpenAI; SAELens layer_norm       |
| unit_norm  | x sqrt(D) / norm(x)             | inverse      | SAELens constant_norm_rescale    |
| affine     | (x - input_mean) * input_factor | inverse      | SAELens expected_average_only_in |

Means and norms of `layer_norm` and `unit_norm` are those of the token; std has the divisor D - 1.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

KINDS = ("none", "layer_norm", "unit_norm", "affine")
_EPS = 1e-5  # of OpenAI's release


def layer_norm(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """z of x [..., D] and the way back."""
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    std = centred.std(-1, keepdim=True)
    return centred / (std + _EPS), lambda y: y * std + mean


def unit_norm(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """z of x [..., D] and the way back."""
    factor = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
    return x * factor, lambda y: y / factor


def affine(x: Tensor, mean: Tensor, factor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """z of x [..., D] under mean and factor, both broadcast over x, and the way back."""
    return (x - mean) * factor, lambda y: y / factor + mean
