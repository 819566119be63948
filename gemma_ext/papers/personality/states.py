"""States of a model behind an answer, at a site that is named by what it means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.lm import HuggingFaceModel, Prompt
from gemma_ext.lm.causal import padded
from gemma_ext.nn._blocks import decoder_layers, site_module
from gemma_ext.papers.personality.contrast import Pair
from gemma_ext.papers.personality.directions import Mean, unit
from gemma_ext.progress import track

Ask = Callable[[str], Prompt]
"""A question as the model is to be asked it."""


def chat(question: str) -> Prompt:
    """The question as a user's message."""
    return [{"role": "user", "content": question}]


def trait_directions(
    lm: HuggingFaceModel,
    pairs: Sequence[Pair],
    layers: Sequence[int],
    *,
    ask: Ask = chat,
    site: str = "resid_mid",
    batch: int = 16,
) -> dict[int, Tensor]:
    """Unit mean difference [D] float32 from low to high answers, for each layer.

    The release reads the output of Gemma-2's `post_attention_layernorm`, which is added to
    resid_mid, and of the module of that name in Llama, which is what the MLP reads: sites are named
    by meaning here.

    Args:
        layers: blocks.
        site: "resid_mid", "resid_post" or "mlp_in".

    Raises:
        ValueError: no pairs, no such block or site, or answers with one mean.
    """
    means = []
    for name in ("high_trait_response", "low_trait_response"):
        told = [(ask(pair.question), getattr(pair, name)) for pair in pairs]
        mean = {layer: Mean() for layer in layers}
        for found in last_states(lm, told, layers, site=site, batch=batch):
            for layer in layers:
                mean[layer].add(found[layer])
        means.append(mean)
    high, low = means
    return {layer: unit(high[layer].result() - low[layer].result()) for layer in layers}


@torch.no_grad()
def last_states(
    lm: HuggingFaceModel,
    told: Sequence[tuple[Prompt, str]],
    layers: Sequence[int],
    *,
    site: str = "resid_mid",
    batch: int = 16,
) -> Iterator[dict[int, Tensor]]:
    """States [b, D] at the last token of each answer, batch by batch, for each layer.

    The answer's own last token, not what a chat template puts behind it.
    """
    jobs = lm.text.jobs(list(told))
    rows = [[*job.context, *job.targets] for job in jobs]
    decoder, blocks = decoder_layers(lm.model)
    places = {layer: site_module(decoder, blocks, layer, site) for layer in layers}
    starts = range(0, len(rows), batch)
    for start in track(starts, "reading states", lm.show_progress):
        some = rows[start : start + batch]
        ids, real = padded(some, left=False, device=lm.model.device)
        found: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for layer, (module, side) in places.items():
                hooks.callback(_kept(module, side, found, layer).remove)
            decoder(input_ids=ids, attention_mask=real, use_cache=False)
        last = torch.tensor([len(row) - 1 for row in some], device=ids.device)
        each = torch.arange(len(some), device=ids.device)
        yield {layer: found[layer][each, last].float() for layer in layers}


def _kept(module: nn.Module, side: str, found: dict[int, Tensor], layer: int) -> Any:
    def behind(module: nn.Module, args: tuple, output: Any) -> None:
        found[layer] = output[0] if isinstance(output, tuple) else output

    def before(module: nn.Module, args: tuple) -> None:
        found[layer] = args[0]

    if side == "output":
        return module.register_forward_hook(behind)
    return module.register_forward_pre_hook(before)
