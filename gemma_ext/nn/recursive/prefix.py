"""Prefixes: each depth has P trained vectors that its queries see as keys and values.

    K = [W_k P_l ; rope(W_k x)],  V = [W_v P_l ; W_v x]

The vectors have the width of the model and pass through the depth's shared projections (and its
norm of keys, where a model has one). They have no position: no RoPE, visible from everywhere
whatever the window, and the tokens' positions begin at 0. Without vectors nothing changes.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.nn.recursive.plan import Plan
from gemma_ext.nn.recursive.tying import decoder_layers

ATTENTION = "gemma_ext_prefix"


def add_prefixes(model: Any, count: int, seed: int = 0) -> Any:
    """Gives each depth of a model `count` vectors [P, D] as `attention.prefix`, in place.

    Args:
        count: P; 0 changes nothing.
        seed: of the vectors, see `initial_prefixes`.

    Raises:
        ValueError: a count below 0, or a model that has prefixes already.
        TypeError: attention without projections of keys and values that are known here.
    """
    if count < 0:
        raise ValueError(f"count: expected a number >= 0, got {count}")
    plan = Plan.of_model(model)
    if plan.prefix:
        raise ValueError(f"model: expected one without prefixes, got {plan.prefix} at each depth")
    if count == 0:
        return model
    _, layers = decoder_layers(model)
    vectors = initial_prefixes(model.config, len(layers), count, seed)
    for attention, values in zip(map(attention_of, layers), vectors, strict=True):
        attention.prefix = nn.Parameter(values.to(next(attention.parameters())))
    use_prefixes(model)
    model.config.recursive = dataclasses.replace(plan, prefix=count).to_dict()
    return model


def initial_prefixes(config: Any, layers: int, count: int, seed: int) -> Tensor:
    """[L, P, D] float32, Gaussian with the deviation that the config gives to weights."""
    config = config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, count, config.hidden_size)
    return torch.randn(shape, generator=generator) * config.initializer_range


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention of a layer.

    Raises:
        TypeError: it has none whose projections are known here.
    """
    for name in ("self_attn", "attention"):
        part = getattr(layer, name, None)
        if hasattr(part, "k_proj") or hasattr(part, "query_key_value"):
            return part
    raise TypeError(
        f"model: expected attention with k_proj and v_proj or query_key_value, got "
        f"{type(layer).__name__}"
    )


def use_prefixes(model: Any) -> None:
    """Has the attention of a model read the prefixes of its modules."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)
    model.config._attn_implementation = ATTENTION


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own eager attention over prefix and tokens; q [B, heads, T, hd]."""
    eager = importlib.import_module(type(module).__module__).eager_attention_forward
    prefix = getattr(module, "prefix", None)
    if prefix is not None:
        k, v = (t.unsqueeze(0).expand(len(key), *t.shape) for t in _keys_values(module, prefix))
        key, value = torch.cat([k, key], 2), torch.cat([v, value], 2)
        if mask is not None:
            mask = nn.functional.pad(mask[..., : key.shape[2] - len(prefix)], (len(prefix), 0))
    return eager(module, query, key, value, mask, **options)


def _keys_values(module: nn.Module, prefix: Tensor) -> tuple[Tensor, Tensor]:
    """[kv heads, P, hd] each."""
    if hasattr(module, "query_key_value"):
        heads = module.query_key_value(prefix).view(len(prefix), -1, 3 * module.head_size)
        _, k, v = heads.transpose(0, 1).chunk(3, dim=-1)
        return k, v
    k = module.k_proj(prefix).view(len(prefix), -1, module.head_dim)
    v = module.v_proj(prefix).view(len(prefix), -1, module.head_dim)
    if hasattr(module, "k_norm"):
        k = module.k_norm(k)
    return k.transpose(0, 1), v.transpose(0, 1)
