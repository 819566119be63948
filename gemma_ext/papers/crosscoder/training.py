"""Training of crosscoders: the L1 one and the BatchTopK one.

    L1          ||x - x^||  +  mu sum_j f_j w_j            w_j = ||d_j^base|| + ||d_j^chat||
    BatchTopK   ||x - x^||  +  1/32 L_aux                  N k largest f_j w_j of a batch

Errors are means over tokens and models; "norm" is the unsquared ||.|| of the released code, which
its mu of 0.041 belongs to, "squared" the paper's form. Decoders are never normalised: their norms
are the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.nn.sparse_autoencoder import (
    BatchTopK,
    DeadLatents,
    Objective,
    ReLU,
    SparseAutoencoder,
    geometric_median,
)
from gemma_ext.sae.stream import shuffled

KINDS = ("batchtopk", "l1")


@dataclass(frozen=True)
class Recipe:
    """How a crosscoder is trained.

    Attributes:
        kind: "batchtopk" or "l1".
        features: F.
        k: mean number of active latents; k_start: of the first step, annealed linearly to k over
            `annealing` steps; None for k. (The release's default of 2048 without annealing trains
            at 2048.)
        mu: weight of the L1 term.
        error: "norm" (release) or "squared" (paper).
        start: norm of a decoder at the start, equal in both models; None for 0.1 (L1) and 1
            (BatchTopK, as in the release). What a short training does not undo of it stays, and
            makes a latent of one model look shared.
        auxiliary: weight of AuxK; dead_after: tokens without firing.
        steps, batch: optimiser steps, and tokens in each.
        rate, warmup, clip: of Adam; its linear warm-up; gradient norm (BatchTopK only).
        seed: of weights and order.
    """

    kind: str
    features: int
    k: float = 100
    k_start: float | None = None
    annealing: int = 0
    mu: float = 0.041
    error: str = "norm"
    start: float | None = None
    auxiliary: float = 1 / 32
    dead_after: int = 10_000_000
    steps: int = 1000
    batch: int = 2048
    rate: float = 1e-4
    warmup: int = 1000
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.annealing and self.k_start is None:
            raise ValueError("k_start: expected a number with annealing, got None")

    def k_at(self, step: int) -> float:
        """k of a step."""
        if step >= self.annealing:
            return self.k
        return self.k_start + (self.k - self.k_start) * step / self.annealing


@dataclass(frozen=True)
class Trained:
    """A crosscoder in evaluation mode, with the losses and the mean L0 of every step."""

    crosscoder: SparseAutoencoder
    losses: list[float]
    active: list[float]


def train(
    x: Tensor,
    recipe: Recipe,
    *,
    rms: float | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Trained:
    """Trains a crosscoder on activations [N, M, D] of the same tokens.

    Args:
        rms: the norm that a centred activation is scaled to have, in the root mean square and in
            every model; sqrt(D) where None, so that an entry is about one. Relative variances of
            dimensions stay. mu = 0.041 is in units of Gemma's raw activations.
        advance: told of every step.

    Raises:
        ValueError: x is not [N, M, D] with N > 0.
    """
    if x.dim() != 3 or x.shape[0] == 0:
        raise ValueError(f"x: expected [N, M, D], got {list(x.shape)}")
    generator = torch.Generator().manual_seed(recipe.seed)
    made = _made(x, recipe, rms, generator)
    aux = recipe.auxiliary if recipe.kind == "batchtopk" else 0.0
    objective = Objective(recipe.error, l1=recipe.mu if recipe.kind == "l1" else 0.0, auxiliary=aux)
    dead = DeadLatents(recipe.features, recipe.dead_after).to(x.device)
    optimizer = torch.optim.Adam(made.parameters(), lr=recipe.rate)
    losses, active = [], []
    order = shuffled(x.shape[0], recipe.steps * recipe.batch, generator).to(x.device)
    for step, tokens in enumerate(order.split(recipe.batch)):
        if recipe.kind == "batchtopk":
            made.activation = dataclasses.replace(made.activation, k=recipe.k_at(step))
        loss = objective(made, x[tokens].float(), dead=dead.mask() if aux else None)
        loss.total.backward()
        if recipe.kind == "batchtopk":
            torch.nn.utils.clip_grad_norm_(made.parameters(), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * _schedule(step, recipe)
        optimizer.step()
        optimizer.zero_grad()
        dead.update(loss.latents.codes)
        if step >= recipe.annealing:
            made.observe(loss.latents)
        losses.append(float(loss.total.detach()))
        active.append(float(loss.latents.codes.count.sum()) / len(tokens))
        advance(1)
    return Trained(made.eval(), losses, active)


def _made(
    x: Tensor, recipe: Recipe, rms: float | None, generator: torch.Generator
) -> SparseAutoencoder:
    sources, width = x.shape[1:]
    sparse = recipe.kind == "batchtopk"
    activation = BatchTopK(recipe.k) if sparse else ReLU()
    made = SparseAutoencoder(
        width,
        recipe.features,
        activation,
        sources=sources,
        subtract_bias=False,
        score_norm="sum",
        standardise="affine",
        device=x.device,
    )
    # small decoders under a penalty on them, unit ones without, as in the release (its 0.005 is for
    # raw activations)
    norm = 1.0 if sparse else 0.1
    made.reset_parameters(generator, norm=norm)
    with torch.no_grad():
        if recipe.start is not None:
            made.decoder *= recipe.start / norm
        mean = x.double().mean(0)
        power = (x.double() - mean).square().sum(-1).mean(0)
        made.input_mean.copy_(mean.flatten())
        made.input_factor.copy_((math.sqrt(width) if rms is None else rms) / power.sqrt())
        if sparse:
            sample = made.standardised(x[: recipe.batch].float())[0]
            made.decoder_bias.copy_(
                torch.cat([geometric_median(part) for part in sample.split(width, -1)])
            )
    return made


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up; a linear decay over the last fifth."""
    return min(1.0, (step + 1) / max(1, recipe.warmup), 5 * (1 - step / recipe.steps))
