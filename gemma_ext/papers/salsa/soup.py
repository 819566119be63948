"""Soups of models in memory: theta = sum_k a_k theta_k, float32 sums, one rounding, one pass.

With a = (alpha, 1 - alpha) the reference of SALSA (arXiv 2411.01798). Embeddings, a tied head and
norms are averaged like everything else; buffers are those of the first parent.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gemma_ext.ops.souping import Part, soup_
from gemma_ext.souping.engine.plan import layer_of
from gemma_ext.souping.live import like, parameters_of

Weights = Sequence[float] | Mapping[str, Sequence[float]]
"""K numbers that add up to 1, or such K by "layer 0", "layer 1", .. and "outside"."""
# of a config: what two runs of one recipe may differ in
_OF_THE_RUN = {"_name_or_path", "transformers_version", "use_cache", "_attn_implementation"}


def soup(
    parents: Sequence[nn.Module],
    weights: Weights | None = None,
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> nn.Module:
    """A new model, frozen and in evaluation mode, of the weighted sum of its parents.

    Memory: the parameters of one model. Reads every parent once and writes once.

    Args:
        parents: K models of one architecture and dtype.
        weights: K numbers, or K of every layer; by default 1 / K each.
        dtype: of the parameters; by default the parents'.
        rounding, seed: "nearest", or "stochastic" into 16 bits.

    Raises:
        ValueError: parents that do not fit each other, or weights that do not.
    """
    check_parents(parents)
    weights = uniform(len(parents)) if weights is None else weights
    made = _hollow(parents[0], dtype)
    soup_into(made, parents, weights, rounding=rounding, seed=seed)
    return made.eval()


def soup_into(
    model: nn.Module,
    parents: Sequence[nn.Module],
    weights: Weights,
    *,
    rounding: str = "nearest",
    seed: int = 0,
) -> None:
    """The same into the parameters of a model, which may be one of the parents.

    Raises:
        ValueError: as `soup`.
    """
    own = parameters_of(model)
    rows = weights_of(weights, list(own), len(parents))
    sources = [like(own, parent, f"parents[{k}]") for k, parent in enumerate(parents)]
    parts = [
        Part([source[name] for source in sources], None, tensor, name)
        for name, tensor in own.items()
    ]
    soup_(parts, torch.tensor(rows, dtype=torch.float64), rounding=rounding, seed=seed)


def uniform(count: int) -> list[float]:
    """1 / K, K times."""
    return [1.0 / count] * count


def group_of(name: str) -> str:
    """The group of a parameter in layer-wise weights."""
    layer = layer_of(name)
    return "outside" if layer is None else f"layer {layer}"


def weights_of(weights: Weights, names: Sequence[str], parents: int) -> list[list[float]]:
    """The K weights of every named parameter.

    Raises:
        ValueError: another number than K, a sum other than 1, or a group without weights.
    """
    if not isinstance(weights, Mapping):
        return [check_weights(weights, parents)] * len(names)
    held = {group: check_weights(row, parents, group) for group, row in weights.items()}
    for name in names:
        if group_of(name) not in held:
            raise ValueError(f"expected weights of {group_of(name)} for {name}, got none")
    return [held[group_of(name)] for name in names]


def check_weights(weights: Sequence[float], parents: int, who: str = "weights") -> list[float]:
    """K floats.

    Raises:
        ValueError: another number than K, or a sum other than 1.
    """
    weights = [float(weight) for weight in weights]
    if len(weights) != parents:
        raise ValueError(f"expected {parents} numbers in {who}, got {len(weights)}")
    total = math.fsum(weights)
    if not abs(total - 1) <= 1e-6:  # a NaN too
        raise ValueError(f"expected {who} to add up to 1, got {total:g}")
    return weights


def check_parents(parents: Sequence[nn.Module]) -> None:
    """Refuses what cannot be averaged.

    Raises:
        ValueError: no parent, adapters that are not merged, or another class, configuration, set of
            parameters, shape or dtype; one sentence says which.
    """
    if not parents:
        raise ValueError("expected at least one parent, got none")
    first = parents[0]
    own = parameters_of(first)
    for k, parent in enumerate(parents):
        who = f"parents[{k}]"
        if hasattr(parent, "peft_config"):
            raise ValueError(
                f"expected {who} without adapters, got some: average their updates (lora_soup), "
                f"as the mean of factors is not the factors of a mean"
            )
        if type(parent) is not type(first):
            raise ValueError(
                f"expected {who} to be a {type(first).__name__}, got {type(parent).__name__}"
            )
        key = _other_setting(first, parent)
        if key is not None:
            raise ValueError(f"expected {who} to have the configuration of the first, not {key}")
        held = parameters_of(parent)
        extra = sorted(set(held) - set(own))
        if extra:
            raise ValueError(f"expected the parameters of the first in {who}, got {extra[0]} more")
        for name, tensor in like(own, parent, who).items():
            if tensor.dtype != own[name].dtype:
                raise ValueError(
                    f"expected {name} of {who} in {own[name].dtype}, got {tensor.dtype}"
                )


def check_tokenizers(tokenizers: Sequence[Any]) -> None:
    """Refuses parents that read text in different ways.

    Raises:
        ValueError: another vocabulary, special token or chat template than the first's.
    """
    for k, tokenizer in enumerate(tokenizers):
        for what, read in (
            ("vocabulary", lambda t: t.get_vocab()),
            ("special tokens", lambda t: t.special_tokens_map),
            ("chat template", lambda t: t.chat_template),
        ):
            if read(tokenizer) != read(tokenizers[0]):
                raise ValueError(
                    f"expected the {what} of the first tokenizer in tokenizers[{k}], got another"
                )


def _other_setting(first: nn.Module, other: nn.Module) -> str | None:
    configs = [getattr(model, "config", None) for model in (first, other)]
    if not all(hasattr(config, "to_dict") for config in configs):
        return None
    one, two = (config.to_dict() for config in configs)
    keys = sorted((set(one) | set(two)) - _OF_THE_RUN)
    return next((key for key in keys if one.get(key) != two.get(key)), None)


def _hollow(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy whose parameters hold nothing yet, frozen; ties stay ties."""
    empty = {
        id(p): nn.Parameter(
            torch.empty_like(p, dtype=dtype or p.dtype, requires_grad=False), requires_grad=False
        )
        for p in model.parameters()
    }
    made = copy.deepcopy(model, empty)
    if dtype is not None and hasattr(made, "config"):
        made.config.dtype = dtype
    return made
