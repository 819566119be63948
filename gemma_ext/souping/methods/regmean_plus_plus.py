"""RegMean++ (arXiv 2508.03121): RegMean whose layer l sees what the merged layers before l give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gemma_ext.progress import track
from gemma_ext.souping.methods.regmean import regmean
from gemma_ext.souping.scoring import unpack
from gemma_ext.souping.statistics.grams import Batch, Grams


@torch.no_grad()
def regmean_plus_plus(
    merged: nn.Module,
    models: Sequence[nn.Module],
    batches: Sequence[Sequence[Batch]],
    *,
    reduction: float = 0.1,
    ridge: float = 1e-10,
    show_progress: bool = False,
) -> None:
    """Merges the linear layers of M models into `merged`, one decoder layer after the other.

    Every model's layer l is run on the merged stream of that model's data; its Gram matrices make
    the merged layer l, which then carries the stream on. Memory: the hidden states of all batches.

    Args:
        merged: transformers model that holds the mean of the models, as `souping.soup_` makes it;
            the linear layers of its decoder layers are overwritten.
        models: M of the same architecture.
        batches: of each model, its data.
        reduction: see `regmean`; 0.1 is MergeBench's choice for this method.
        ridge: see `regmean`.
        show_progress: a bar that counts layers.

    Raises:
        ValueError: another number of data sets than of models, or an empty one.
    """
    if len(batches) != len(models):
        raise ValueError(f"expected batches of {len(models)} models, got {len(batches)}")
    if not all(batches):
        raise ValueError("expected at least one batch for every model, got none")
    streams = [[_Stream(merged, batch) for batch in own] for own in batches]
    layers = [decoder_layers(model) for model in models]
    own_layers = list(enumerate(decoder_layers(merged)))
    for index, layer in track(own_layers, "regmean++", show_progress):
        candidates = [stack[index] for stack in layers]
        grams = [_layer_grams(c, own, index) for c, own in zip(candidates, streams, strict=True)]
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                weights = [candidate.get_submodule(name).weight for candidate in candidates]
                found = [gram[f"{name}.weight"] for gram in grams]
                module.weight.copy_(regmean(weights, found, reduction=reduction, ridge=ridge))
        for stream in (stream for own in streams for stream in own):
            stream.advance(layer, index)


def _layer_grams(layer: nn.Module, streams: Sequence[_Stream], index: int) -> dict[str, Tensor]:
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    grams = Grams(linears, torch.float32)
    for stream in streams:
        with grams.watching(stream.mask):
            stream.through(layer, index)
    return grams.result()


class _Stream:
    """The hidden states of one batch between two layers, and the other arguments of every layer."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        ids, self.mask = unpack(batch, next(model.parameters()).device)
        self.calls: list[tuple[tuple, dict]] = []

        def record(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self.calls.append((args, kwargs))

        hooks = [
            layer.register_forward_pre_hook(record, with_kwargs=True)
            for layer in decoder_layers(model)
        ]
        try:
            model.base_model(input_ids=ids, attention_mask=self.mask, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        self.hidden = self.calls[0][0][0]
        self.calls = [(args[1:], kwargs) for args, kwargs in self.calls]

    def through(self, layer: nn.Module, index: int) -> Tensor:
        args, kwargs = self.calls[index]
        out = layer(self.hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(self, layer: nn.Module, index: int) -> None:
        self.hidden = self.through(layer, index)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a transformers causal LM, in order.

    Raises:
        ValueError: there are none under `layers`.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"expected decoder layers in {type(model).__name__}, got none")
    return layers
