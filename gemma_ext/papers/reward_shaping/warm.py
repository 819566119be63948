"""WARM (arXiv 2401.12187): one reward model whose weights are the mean of several.

    theta = sum_m w_m theta_m,  w_m = 1 / M,  in float32

The reference implementation takes the mean in bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.papers.reward_shaping.hooks import RewardFunction
from gemma_ext.souping import soup_

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def warm(
    models: Sequence[PreTrainedModel], weights: Sequence[float] | None = None
) -> PreTrainedModel:
    """The mean of reward models of one architecture, as a new model in float32.

    Args:
        weights: of the models, which sum to 1; even by default.

    Raises:
        ValueError: no models, another number of weights, or weights of another sum.
    """
    if not models:
        raise ValueError("models: expected at least one, got none")
    shares = [1 / len(models)] * len(models) if weights is None else list(weights)
    if len(shares) != len(models):
        raise ValueError(f"weights: expected {len(models)}, got {len(shares)}")
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"weights: expected a sum of 1, got {sum(shares):g}")
    made = copy.deepcopy(models[0]).to(torch.float32)
    soup_(made, list(models[1:]), shares)
    return made


class Ensemble:
    """The mean score of several reward functions, with what they disagree by.

    Its spread over the members, at the last call, is `disagreement` [B].
    """

    def __init__(self, members: Sequence[RewardFunction]) -> None:
        if len(members) < 2:
            raise ValueError(f"members: expected at least 2, got {len(members)}")
        self.members = list(members)
        self.disagreement: Tensor | None = None
        self.__name__ = "ensemble"

    def __call__(self, *inputs: object, **columns: object) -> Tensor:
        scores = torch.stack([torch.as_tensor(f(*inputs, **columns)) for f in self.members])
        self.disagreement = scores.double().std(0)
        if log := columns.get("log_metric"):
            log("ensemble/disagreement", float(self.disagreement.mean()))
        return scores.mean(0)
