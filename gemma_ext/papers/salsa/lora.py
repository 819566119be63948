"""Parents that are LoRA adapters of one base: theta = theta_0 + sum_k a_k s_k B_k A_k.

The updates are averaged, not the factors: (mean B)(mean A) has cross terms B_j A_k in it. Ranks
side by side, [B_1 .. B_K] [a_1 s_1 A_1; ..; a_K s_K A_K], are the average exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from gemma_ext.papers.salsa.soup import check_parents, check_weights, soup, uniform
from gemma_ext.souping.lora import Adapter, Factors, merge_adapters


def lora_average(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """One float32 adapter of rank sum_k r_k that is the average of the updates.

    `souping.lora.save_adapter` writes it for peft: as the adapter "ref" of a policy of trl, say.

    Args:
        adapters: K, of `souping.lora.load_adapter`. A module that one of them lacks counts as an
            update of zero there.
        weights: K numbers that add up to 1; by default 1 / K each.

    Raises:
        ValueError: see `souping.lora.merge_adapters`; or weights that do not add up to 1.
    """
    if not adapters:
        raise ValueError("expected at least one adapter, got none")
    weights = check_weights(weights or uniform(len(adapters)), len(adapters))
    return merge_adapters([_widened(adapter) for adapter in adapters], weights, "cat")


def lora_soup(
    base: nn.Module, adapters: Sequence[Adapter], weights: Sequence[float] | None = None
) -> nn.Module:
    """A frozen model: the base and the average of the adapters' updates, rounded once.

    Args:
        base: without adapters.
        adapters, weights: as of `lora_average`.

    Raises:
        ValueError: as `lora_average`; or a module that the base does not have.
    """
    check_parents([base])
    average = lora_average(adapters, weights)
    modules = dict(base.named_modules())
    for name, factors in average.factors.items():
        if name not in modules or not hasattr(modules[name], "weight"):
            raise ValueError(f"expected a module {name} in the base, got none")
        dense = (factors.b.shape[0], factors.a.shape[1])
        shape = dense[::-1] if name in average.embeddings else dense
        if modules[name].weight.shape != shape:
            raise ValueError(
                f"expected an update of {list(modules[name].weight.shape)} for {name}, "
                f"got {list(shape)}"
            )
    made = soup([base])
    written = dict(made.named_modules())
    for name, factors in average.factors.items():
        update = factors.dense()
        update = update.T if name in average.embeddings else update
        weight = written[name].weight
        weight.data.copy_(weight.float() + update.to(weight.device))
    return made


def _widened(adapter: Adapter) -> Adapter:
    factors = {
        name: Factors(f.a.to(torch.float32), f.b.to(torch.float32), f.scaling)
        for name, f in adapter.factors.items()
    }
    return replace(adapter, factors=factors)
