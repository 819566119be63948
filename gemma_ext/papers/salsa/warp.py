"""Policies after training: WARP's merge, and rewarded soups.

WARP (arXiv 2406.16768), with tau_m = theta_m - theta_init of M policies, per tensor:

    tau   = slerp(tau_1, .., tau_M)          M = 2: along the arc; M > 2: one after another, with
                                             shares 1/2, 1/3, ..
    theta = theta_init + eta tau             towards the initialisation: eta = 1 is the merge itself

Anchors of the runs are `references.ema`; the result is the next iteration's init. The paper's
constants are not known here, so they are arguments. Rewarded soups (arXiv 2306.04488) are weighted
sums of policies trained on different rewards from one start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gemma_ext.ops.souping import Gram, Part, soup_
from gemma_ext.papers.salsa.soup import Weights, check_parents, soup, soup_into
from gemma_ext.souping.live import like, parameters_of
from gemma_ext.souping.methods.directions import slerp


def warp(init: nn.Module, policies: Sequence[nn.Module], eta: float) -> nn.Module:
    """A frozen model: the policies' task vectors merged on the sphere, then drawn towards `init`.

    Every tensor is read twice: once for the inner products, once for the sum, rounded once.

    Args:
        init: what all policies were trained from.
        policies: M of its architecture.
        eta: share of the merge, 0 gives `init`.

    Raises:
        ValueError: no policy, or one that does not fit.
    """
    if not policies:
        raise ValueError("expected at least one policy, got none")
    check_parents([init, *policies])
    made = soup([init])
    base, out = parameters_of(init), parameters_of(made)
    held = [like(base, policy, f"policies[{m}]") for m, policy in enumerate(policies)]
    parts, rows = [], []
    for name, tensor in base.items():
        sources = [each[name] for each in held]
        gram = Gram(len(policies))
        gram.add([Part(sources, tensor, None, name)])
        rows.append(_on_the_sphere(gram.value[0]))
        parts.append(Part(sources, tensor, out[name], name))
    soup_(parts, torch.stack(rows), scale=eta)
    return made


def _on_the_sphere(gram: torch.Tensor) -> torch.Tensor:
    """[M] coefficients of slerp taken one after another, from inner products [M, M] alone."""
    coefficients = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    merged = coefficients[0]
    for m in range(1, len(gram)):
        pair = torch.stack([merged, coefficients[m]])
        merged = slerp(pair @ gram @ pair.T, 1 / (m + 1)) @ pair
    return merged


def rewarded_soups(
    policies: Sequence[nn.Module],
    weights: Sequence[Weights],
    score: Callable[[nn.Module], Any],
) -> list[Any]:
    """What `score` says of weighted sums of policies, all in the memory of one model.

    Args:
        policies: K, of one start and K rewards.
        weights: for each soup K numbers that add up to 1.
        score: of a model, called once for each; the model is written over afterwards.

    Raises:
        ValueError: as `salsa.soup`.
    """
    check_parents(policies)
    made = soup(policies[:1])
    found = []
    for row in weights:
        soup_into(made, policies, row)
        found.append(score(made))
    return found
