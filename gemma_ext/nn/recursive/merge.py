"""A recursive model as an ordinary one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from gemma_ext.nn.recursive._build import build
from gemma_ext.nn.recursive.linear import DepthLinear
from gemma_ext.nn.recursive.plan import Plan
from gemma_ext.nn.recursive.tying import decoder_layers


def merged(model: Any) -> Any:
    """A vanilla copy: L layers of their own with W_l = W'_s(l) + B_l A_l.

    What it computes is what the recursive model does, up to rounding; without low-rank matrices to
    the bit.

    Raises:
        ValueError: the model has prefixes or a head for exits, which no vanilla model has.
    """
    plan = Plan.of_model(model)
    if plan.prefix:
        raise ValueError(f"model: expected no prefixes to merge, got {plan.prefix} at each depth")
    if hasattr(model, "exit_head"):
        raise ValueError("model: expected no head for exits, got exit_head; delete it first")
    config = copy.deepcopy(model.config)
    if hasattr(config, "recursive"):
        del config.recursive
    name, layers = decoder_layers(model)
    state = {key: t for key, t in model.state_dict().items() if not key.startswith(f"{name}.")}
    for depth, layer in enumerate(layers):
        state |= {f"{name}.{depth}.{key}": t for key, t in vanilla_state(layer).items()}
    state = {key: t.clone() for key, t in state.items()}
    made = build(type(model), config, state)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).train(model.training)


def vanilla_state(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of one depth, low-rank matrices multiplied in."""
    state = {k: t for k, t in layer.state_dict().items() if ".lora_" not in k}
    for path, part in layer.named_modules():
        if isinstance(part, DepthLinear):
            state[f"{path}.weight"] = part.merged_weight()
    return state
