"""Where things are in a decoder of transformers, and which tokens a call of it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SITES = ("resid_post", "resid_mid", "mlp_in")
# model_type: the module of a block whose input is the residual stream between attention and MLP
_BEFORE_MLP = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "pre_feedforward_layernorm"),
    **dict.fromkeys(("gemma", "llama", "mistral", "qwen2", "qwen3"), "post_attention_layernorm"),
}


def decoder_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder of a transformers causal LM, or itself, and its blocks in order.

    Raises:
        ValueError: there are none under `layers`.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    decoder = model if decoder is None else decoder
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"expected decoder layers in {type(model).__name__}, got none")
    return decoder, layers


def site_module(
    decoder: nn.Module, blocks: nn.ModuleList, layer: int, site: str
) -> tuple[nn.Module, str]:
    """The module to hook and the place there: "output", "input", or "in place".

    Raises:
        ValueError: no such block or site, or one that this architecture is not known to have.
    """
    if not 0 <= layer < len(blocks):
        raise ValueError(f"expected layer in [0, {len(blocks)}), got {layer}")
    if site not in SITES:
        raise ValueError(f"expected site to be resid_post, resid_mid or mlp_in, got {site!r}")
    block = blocks[layer]
    if site == "resid_post":
        return block, "output"
    kind = getattr(getattr(decoder, "config", None), "model_type", None)
    if kind not in _BEFORE_MLP:
        raise ValueError(
            f"expected a model of type {', '.join(sorted(_BEFORE_MLP))} for site={site!r}, "
            f"got {kind!r}"
        )
    if site == "mlp_in":
        return block.mlp, "input"
    return getattr(block, _BEFORE_MLP[kind]), "in place"


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The key-value cache of a call, under either of its names, or None."""
    found = kwargs.get("cache")
    return kwargs.get("past_key_values") if found is None else found


class Sequences:
    """Tokens of the sequences that calls of a decoder go through.

    Attributes:
        start: columns before those of the call.
        seen: columns up to its end.
        first_end: columns of the call that started the sequences.
    """

    def __init__(self, mask: Tensor | None, skip_first: bool, must_go_on: bool) -> None:
        self.given = mask
        self.skip_first = skip_first
        self.must_go_on = must_go_on
        self.start = self.seen = self.first_end = self.batch = 0
        self.mask: Tensor | None = None

    def start_call(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Looks at what the decoder is called with.

        Raises:
            ValueError: a mask that does not tell padding.
            RuntimeError: a call that goes on with other sequences than the last one had.
        """
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens = next(x for x in given if x is not None)
        cache = cache_of(kwargs)
        start = 0 if cache is None else int(cache.get_seq_length())
        batch, count = tokens.shape[:2]
        if start and self.must_go_on and (start, batch) != (self.seen, self.batch):
            raise RuntimeError(
                f"expected a call that goes on after {self.seen} tokens of {self.batch} "
                f"sequences, got one after {start} tokens of {batch}: gates that remember "
                "cannot follow"
            )
        self.start, self.seen, self.batch = start, start + count, batch
        if start == 0:
            self.first_end = count
        self.mask = self._two_dimensional(kwargs.get("attention_mask"))

    def _two_dimensional(self, mask: Any) -> Tensor | None:
        if self.given is not None:
            missing = self.seen - self.given.shape[1]
            more = self.given.new_ones(self.given.shape[0], max(missing, 0))
            return torch.cat([self.given, more], 1)
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < self.seen:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"expected the model's attention_mask to be [{self.batch}, {self.seen}], got "
                f"{shape}; hand that of the prompt to steer_hook(attention_mask=...)"
            )
        return mask

    def columns(self, device: torch.device) -> Tensor:
        """int64 [1, T]: places of the call's tokens."""
        return torch.arange(self.start, self.seen, device=device).unsqueeze(0)

    def readable(self, device: torch.device) -> Tensor:
        """bool [B, T]: tokens that are no padding, and not the first of their sequence."""
        if self.mask is None:
            least = 1 if self.skip_first else 0
            return (self.columns(device) >= least).expand(self.batch, -1)
        real = self.mask[:, : self.seen].to(device).bool()
        if self.skip_first:
            real = real & (real.cumsum(1) > 1)
        return real[:, self.start :]
