"""Task vectors of weight matrices, merged by their singular vectors. All of it in float64.

delta_k = theta_k - theta_0 = U_k S_k V_k^T, M models, rank q = min(rows, columns).

TSV (arXiv 2412.00081): of every delta_k the first floor(q / M) singular triplets, side by side in
U [rows, r], S [r], V [columns, r]; both bases are replaced by the nearest orthonormal ones,
U~ = polar(U), V~ = polar(V):

    out = theta_0 + lambda U~ diag(S) V~^T

Iso-C (arXiv 2502.04959): with sum_k delta_k = U S V^T,

    out = theta_0 + lambda mean(S) U V^T

What is no matrix, an embedding or an output head has no singular directions to share out: it gets
theta_0 + lambda mean_k delta_k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma_ext.ops.souping import Part, soup_
from gemma_ext.souping.method import Method, TensorInfo, Values
from gemma_ext.souping.methods.keys import LAMBDA

_VOCABULARY = ("embed", "lm_head", "wte")


def tsv(deltas: Tensor) -> Tensor:
    """U~ diag(S) V~^T of deltas [M, rows, columns]."""
    share = min(deltas.shape[1:]) // len(deltas)
    factors = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = torch.cat([u[:, :share] for u, _, _ in factors], dim=1)
    scales = torch.cat([s[:share] for _, s, _ in factors])
    right = torch.cat([vh[:share] for _, _, vh in factors])
    return (polar(left) * scales) @ polar(right)


def iso_c(deltas: Tensor) -> Tensor:
    """mean(S) U V^T of the sum of deltas [M, rows, columns]."""
    u, s, vh = torch.linalg.svd(deltas.sum(0), full_matrices=False)
    return s.mean() * (u @ vh)


def polar(matrix: Tensor) -> Tensor:
    """The matrix with orthonormal rows or columns that is nearest to `matrix`."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


class _Spectral(Method):
    base = "needed"
    grain = "tensor"
    parameters = (LAMBDA,)

    def begin(self, tensor: TensorInfo, values: Values) -> tuple[bool, float]:
        vocabulary = any(word in tensor.name for word in _VOCABULARY)
        return len(tensor.shape) == 2 and not vocabulary, values.merge["lambda"]

    def merge(self, part: Part, state: Any) -> None:
        has_directions, scale = state
        if not has_directions:
            soup_([part], 1.0 / len(part.sources), scale=scale)
            return
        base = part.base.double()
        deltas = torch.stack([source.double() - base for source in part.sources])
        part.out.copy_(base + scale * self.combine(deltas))

    @staticmethod
    def combine(deltas: Tensor) -> Tensor:
        raise NotImplementedError


class TaskSingularVectors(_Spectral):
    """Task singular vectors, the bases made orthogonal to each other (TSV-Merge)."""

    name = "tsv"
    combine = staticmethod(tsv)


class IsoC(_Spectral):
    """Isotropic merging in the common subspace: every direction of the sum weighs the same."""

    name = "iso_c"
    combine = staticmethod(iso_c)
