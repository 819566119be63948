"""Predicted bytes of each phase of a run, said before its first step.

| phase   | beside the weights                                                                   |
|---------|--------------------------------------------------------------------------------------|
| rollout | keys and values of a pass, and one step's logits with their noise                    |
| scoring | states of one layer of a pass                                                        |
| update  | gradients and Adam's moments, and what the backward of a micro-batch needs           |

No phase has a [B, T, V] tensor. An estimate from the model's shape: allocators round up, kernels
keep workspaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gemma_ext.nn._models import unwrap
from gemma_ext.ppo.config import PPOConfig
from gemma_ext.report import size

_SCORES = 5  # copies of one step's [B, V] logits in float32: scores, log-sum, warpers, noise
_NORMED = 10  # states of width D that a layer's backward needs: residuals, norms and their inputs
_GATED = 4  # of the MLP's width: gate, its activation, up, their product


@dataclass(frozen=True)
class Plan:
    """Bytes of a rank; `rollout`, `scoring` and `update` come on top of `weights`."""

    weights: int
    rollout: int
    scoring: int
    update: int

    @property
    def peak(self) -> int:
        return self.weights + max(self.rollout, self.scoring, self.update)

    def line(self) -> str:
        """For people."""
        parts = ", ".join(
            f"{name} +{size(getattr(self, name))}" for name in ("rollout", "scoring", "update")
        )
        return f"memory: weights {size(self.weights)}, {parts}; peak about {size(self.peak)}"


def plan(
    config: PPOConfig,
    policy: nn.Module,
    trained: Iterable[nn.Parameter],
    others: Iterable[nn.Module],
    prompt_width: int,
) -> Plan:
    """The plan of a run.

    Args:
        trained: parameters under optimisers.
        others: critic, reference and rewards that have weights; shared ones count once.
        prompt_width: P, tokens of a long prompt.
    """
    shape = _shape(unwrap(policy).config.get_text_config())
    every = {p.data_ptr(): p for m in (policy, *others) for p in m.parameters()}
    weights = sum(p.numel() * p.element_size() for p in every.values())
    element = 2 if config.bf16 else next(policy.parameters()).element_size()
    rows = min(config.local_rollout_forward_batch_size, config.local_batch_size)
    tokens = prompt_width + config.response_length
    width, layers = shape["width"], shape["layers"]
    keys = rows * tokens * layers * 2 * shape["keys"] * element
    attention = shape["heads"] * tokens * tokens * element  # of eager attention, a row's
    layer = (_NORMED * width + 2 * shape["projected"] + _GATED * shape["mlp"]) * element
    micro = config.per_device_train_batch_size
    kept = micro * (tokens * layer + 2 * attention)
    saved = kept * layers
    if config.gradient_checkpointing:
        saved = kept + micro * tokens * layers * width * element
    return Plan(
        weights,
        keys + rows * shape["vocabulary"] * 4 * _SCORES,
        rows * (tokens * layer + 2 * attention),
        sum(p.numel() * (p.element_size() + 8) for p in trained) + saved,
    )


def _shape(config: Any) -> Mapping[str, int]:
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "keys": keys,
        "projected": heads * head + 2 * keys,
        "mlp": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "vocabulary": config.vocab_size,
    }
