"""Where the keys and values of each loop lie, and who writes those of loops that a token skipped.

| policy | depths of a layer | skipped loops |
|---|---|---|
| exact_lazy, exact_eager | one for each loop | the scheduler runs the token there later |
| propagate (CALM) | one for each loop | projected from the state the token left with |
| copy (DREX, Ouro) | one for each loop | copies of the last loop that ran |
| single (Huginn) | one, overwritten at each loop | nobody |
| first_then_shared | loop min(j, keep) | copies of the last loop that ran |
| modulo (Huginn) | loop j mod keep | copies of the last loop that ran |
| active_only (MoR) | one for each loop | nobody: later tokens do not see the token there |

Only the exact ones give what a model that runs every loop of every token would give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_ext.nn.recursive import Plan
from gemma_ext.ops.depth_batching import DeeperLayer
from gemma_ext.ops.depth_batching.kv import kv_depths
from gemma_ext.serve.weights import Layer, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLICIES = (
    "exact_lazy",
    "exact_eager",
    "propagate",
    "copy",
    "single",
    "first_then_shared",
    "modulo",
    "active_only",
)
EXACT = ("exact_lazy", "exact_eager")
WRITTEN = ("propagate", "copy", "first_then_shared", "modulo")  # when a token leaves
_SHARED = ("single", "first_then_shared", "modulo")


def trained_policy(model: PreTrainedModel) -> dict[str, Any]:
    """`kv_policy` and `keep` that a model was trained with, as its config tells; exact_lazy where
    it tells none, whose tokens are those of every loop of every token.

    Raises:
        ValueError: a policy that no engine has.
    """
    plan = Plan.of_model(model)
    if plan.kv_policy not in ("", *POLICIES):
        raise ValueError(
            f"kv_policy: expected one of {', '.join(POLICIES)} in the config of the model, "
            f"got {plan.kv_policy!r}"
        )
    return {"kv_policy": plan.kv_policy or "exact_lazy", "keep": plan.keep}


@dataclass(frozen=True)
class Depths:
    """Places of a model's layers in the pool of keys and values.

    Attributes:
        prelude, block, coda: int32 [loops] of each layer.
        count: L of the pool.
        rows: int32 [K, loops] of the block.
    """

    prelude: tuple[Tensor, ...]
    block: tuple[Tensor, ...]
    coda: tuple[Tensor, ...]
    count: int

    @property
    def rows(self) -> Tensor:
        return torch.stack(self.block)


def deeper_layers(weights: Weights, depths: Depths) -> list[DeeperLayer]:
    """The layers that a token which leaves early has not run, for `kv_propagate`."""
    pairs = ((weights.block, depths.block), (weights.coda, depths.coda))
    return [
        DeeperLayer(layer.attention_norm, *layer.qkv[1:], places, layer.rope_of, layer.k_norm)
        for layers, own in pairs
        for layer, places in zip(layers, own, strict=True)
    ]


def pool_depths(weights: Weights, policy: str, keep: int = 1) -> Depths:
    """Depths of the pool under a policy.

    Args:
        keep: k of first_then_shared and modulo.

    Raises:
        ValueError: an unknown policy; "active_only" or prefixes on a model with attention windows,
            which count positions and not the tokens that are left or in front; one that leaves
            layers behind the loops without keys of tokens that left early; one whose loops share
            the places of a model's prefixes, which differ.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    layers = (*weights.prelude, *weights.block, *weights.coda)
    windows = any(bool(layer.window.any()) for layer in layers)
    if policy == "active_only" and windows:
        raise ValueError("policy: expected a model without attention windows with active_only")
    if weights.prefix and policy in _SHARED:
        raise ValueError(f"policy: expected a model without prefixes with {policy}")
    if weights.coda and policy not in (*EXACT, "propagate"):
        raise ValueError(f"policy: expected a model without layers behind its loops with {policy}")
    loops, stored = weights.loops, len(weights.block)
    of_loop = kv_depths(policy if policy in _SHARED else "own", loops, keep)
    first = len(weights.prelude)
    last = first + stored * (max(of_loop) + 1)

    def place(depths: list[int], layer: Layer) -> Tensor:
        return torch.tensor(depths, dtype=torch.int32, device=layer.window.device)

    return Depths(
        tuple(place([i] * loops, layer) for i, layer in enumerate(weights.prelude)),
        tuple(
            place([first + j * stored + s for j in of_loop], layer)
            for s, layer in enumerate(weights.block)
        ),
        tuple(place([last + i] * loops, layer) for i, layer in enumerate(weights.coda)),
        last + len(weights.coda),
    )
