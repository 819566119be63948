"""Learning atoms from hidden states: JumpReLU training of a dictionary that is tied through S.

    w_i      = unit rows, the parameters           d_i = a L w_i
    z        = S-encoder of d_i (`product`)        f   = z 1[z >= tau]
    loss     = ||m - b - D f||^2 / ||m - b||^2 + c (L0 / L0* - 1)^2      norms plain, or under S

tau is learned by the straight-through estimators of JumpReLU, through a window of width h.
All atoms have the norm a under S (so that the windows apply) that gives codes near one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.nn.sparse_autoencoder import jump, step
from gemma_ext.ops import sae
from gemma_ext.papers.atoms.dictionary import Dictionary
from gemma_ext.papers.atoms.product import AtomicProduct
from gemma_ext.sae.stream import shuffled

NORMS = ("plain", "atomic")


@dataclass(frozen=True)
class Recipe:
    """How atoms are learned. The paper's own settings are not known; these are of JumpReLU SAEs.

    Attributes:
        features: atoms, F; the paper has 4 D.
        norm: "plain", or "atomic" for errors under S: where one direction holds most of the
            variance, as in a residual stream with massive activations, it is all that plain errors
            see.
        target: active atoms of a token that the sparsity term aims at, L0*.
        sparsity: its weight c.
        steps, batch: optimiser steps, and rows in each.
        rate: peak learning rate of Adam, for unit rows.
        start: threshold at the start, in units of a code.
        bandwidth: h.
        seed: of atoms and order.
    """

    features: int
    target: float
    norm: str = "plain"
    sparsity: float = 0.1
    steps: int = 1000
    batch: int = 1024
    rate: float = 2e-3
    start: float = 0.3
    bandwidth: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Learned:
    """A dictionary and how its training went: shares of variance unexplained and mean L0."""

    dictionary: Dictionary
    unexplained: list[float]
    active: list[float]


def learn(
    x: Tensor,
    product: AtomicProduct,
    recipe: Recipe,
    bias: Tensor | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Learned:
    """Learns atoms from rows [N, D].

    Args:
        product: estimated from the same states (`moments`).
        bias: [D] b; zero as in the paper, or the mean of the states.
        advance: told of every step.

    Raises:
        ValueError: no rows, a target that is not positive, or an unknown norm.
    """
    if x.dim() != 2 or x.shape[0] == 0:
        raise ValueError(f"x: expected rows [N, D], got {list(x.shape)}")
    if recipe.norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {recipe.norm!r}")
    if recipe.target <= 0:
        raise ValueError(f"target: expected above 0, got {recipe.target}")
    generator = torch.Generator().manual_seed(recipe.seed)
    b = torch.zeros(x.shape[1]) if bias is None else bias.float()
    b = b.to(x.device)
    factor = product.factor.float()
    inverse = torch.linalg.solve_triangular(
        product.factor, torch.eye(x.shape[1], dtype=torch.float64, device=x.device), upper=False
    ).float()
    # whitened states have length sqrt(D): L0* codes of about one reach it
    scale = math.sqrt(x.shape[1] / recipe.target)
    rows = torch.nn.Parameter(_initial(x, b, inverse, recipe.features, generator))
    tau = torch.nn.Parameter(torch.full((recipe.features,), recipe.start, device=x.device))
    optimizer = torch.optim.Adam([rows, tau], lr=recipe.rate)
    unexplained, active = [], []
    order = shuffled(x.shape[0], recipe.steps * recipe.batch, generator).to(x.device)
    for number, rows_of in enumerate(order.split(recipe.batch)):
        m = x[rows_of].float() - b
        if recipe.norm == "atomic":
            m, atoms, encoder = m @ inverse.T, scale * rows, rows / scale
        else:
            atoms, encoder = scale * (rows @ factor.T), (rows @ inverse) / scale
        window = sae.encode_threshold(
            m,
            encoder,
            threshold=tau.detach(),
            margin=recipe.bandwidth / 2,
            inclusive=True,
        ).codes
        chosen = tau.gather(0, window.indices.long())
        f = jump(window.values, chosen, recipe.bandwidth, inclusive=True)
        on = step(window.values, chosen, recipe.bandwidth, inclusive=True)
        squared = sae.decode_error(window.with_values(f), atoms, None, m)[1]
        loss = squared.sum() / m.square().sum()
        count = on.sum() / m.shape[0]
        (loss + recipe.sparsity * (count / recipe.target - 1) ** 2).backward()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * _schedule(number, recipe.steps)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            rows.div_(rows.norm(dim=1, keepdim=True))
            tau.clamp_(min=recipe.bandwidth / 2)
        unexplained.append(float(loss.detach()))
        active.append(float(count.detach()))
        advance(1)
    atoms = scale * (rows.detach() @ factor.T)
    return Learned(Dictionary.of(atoms, product, tau.detach(), b), unexplained, active)


def _initial(
    x: Tensor, b: Tensor, inverse: Tensor, features: int, generator: torch.Generator
) -> Tensor:
    """Unit rows: whitened states drawn at random, half way to random directions."""
    picked = torch.randint(x.shape[0], (features,), generator=generator).to(x.device)
    states = torch.nn.functional.normalize((x[picked].float() - b) @ inverse.T, dim=1)
    noise = torch.randn(features, x.shape[1], generator=generator).to(x.device)
    noise = torch.nn.functional.normalize(noise, dim=1)
    return torch.nn.functional.normalize(states + noise, dim=1)


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 50) * min(1.0, 5 * (1 - step / steps))
