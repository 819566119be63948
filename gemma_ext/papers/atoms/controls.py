"""Dictionaries that nobody learned, as dense in their codes as the learned one.

| control | what it is                               | what it shows                            |
|---------|------------------------------------------|------------------------------------------|
| random  | F Gaussian directions                    | whitening alone makes nearly orthogonal  |
| axes    | both signs of the states' principal axes | q* can be one without any atom           |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gemma_ext.ops import sae
from gemma_ext.papers.atoms.dictionary import Dictionary
from gemma_ext.papers.atoms.product import AtomicProduct


def random_dictionary(
    product: AtomicProduct,
    features: int,
    x: Tensor,
    active: float,
    bias: Tensor | None = None,
    seed: int = 0,
) -> Dictionary:
    """F Gaussian directions of one norm under the product.

    Args:
        x: [N, D] states to set the threshold on.
        active: mean number of active atoms.
    """
    width = product.factor.shape[0]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(features, width, generator=generator, dtype=torch.float64)
    return _of_directions(rows.to(product.factor.device), product, x, active, bias)


def principal_axes(
    product: AtomicProduct, x: Tensor, active: float, bias: Tensor | None = None
) -> Dictionary:
    """Both signs of every eigenvector of the moment [2 D]: orthogonal under the product."""
    axes = torch.linalg.eigh(product.factor @ product.factor.T).eigenvectors.T
    white = product.whiten(axes)
    return _of_directions(torch.cat([white, -white]), product, x, active, bias)


def at_density(dictionary: Dictionary, x: Tensor, active: float) -> Dictionary:
    """The same atoms with the one threshold that leaves `active` codes a state in x [N, D].

    Raises:
        ValueError: fewer codes than that are positive.
    """
    rows, shift = dictionary.encoder()
    total = round(active * x.shape[0])
    found = sae.encode_batch_topk(x.float(), rows, shift, total=total)
    if int(found.codes.offsets[-1]) < total:
        raise ValueError(
            f"active: expected at most {int(found.codes.offsets[-1]) / x.shape[0]:.3g} "
            f"positive codes a state, got {active}"
        )
    return Dictionary.of(dictionary.atoms, dictionary.product, found.min_positive, dictionary.bias)


def _of_directions(
    white: Tensor, product: AtomicProduct, x: Tensor, active: float, bias: Tensor | None
) -> Dictionary:
    length = math.sqrt(white.shape[1] / active)
    atoms = length * product.colour(torch.nn.functional.normalize(white, dim=1))
    return at_density(Dictionary.of(atoms.float(), product, 0.0, bias), x, active)
