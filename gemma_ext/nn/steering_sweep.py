"""Many strengths of one steering: blocks up to the steered one run once for all of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.nn._blocks import cache_of, decoder_layers
from gemma_ext.nn.steering import SteerHook
from gemma_ext.ops.sae import Steering


class SteerSweep:
    """S strengths of a steering at the output of a block, as a batch of S * B sequences.

    Steering after block N leaves the activations and keys and values of blocks up to N as they
    are, so those of a prompt are computed once: of L blocks and S strengths N + S (L - N) block
    passes are left of S L.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        layer: the steered block, at resid_post.
        steering: whose strengths are multiplied by each of `strengths`.
        strengths: S factors.
        skip_first, impl: as `steer_hook`.

    Raises:
        ValueError: no such block, strengths [B, S] in the steering, or no strength at all.

    Example:
        >>> sweep = SteerSweep(model, 10, toxic, [0, 0.5, 1, 2])
        >>> texts = sweep.generate(**tokens, max_new_tokens=20, do_sample=False)  # [4, B, T + 20]
    """

    def __init__(
        self,
        model: nn.Module,
        layer: int,
        steering: Steering,
        strengths: Sequence[float],
        *,
        skip_first: bool = True,
        impl: str = "auto",
    ) -> None:
        self.model, self.layer = model, layer
        self.decoder, self.blocks = decoder_layers(model)
        if not 0 <= layer < len(self.blocks):
            raise ValueError(f"expected layer in [0, {len(self.blocks)}), got {layer}")
        if steering.requests_of_its_own != 1:
            raise ValueError("expected one steering for a sweep, got one of several requests")
        if not len(strengths):
            raise ValueError("expected at least one strength, got none")
        self.steering = steering
        self.strengths = [float(s) for s in strengths]
        self.options = {"skip_first": skip_first, "impl": impl}

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Last hidden states [S, B, T, D] of prompts [B, T]: what an LM head reads."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hook = self._hook(input_ids.shape[0])
        lower, _ = self._lower(input_ids, mask)
        found, _ = self._upper(hook, lower, input_ids, mask)
        return found.reshape(len(self.strengths), *input_ids.shape, -1)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """`model.generate` of every strength: [S, B, T + new] for prompts [B, T], padded left.

        Draws differ from those of one strength alone; without sampling the tokens are the same.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hook = self._hook(input_ids.shape[0])
        if input_ids.shape[1] > 1:
            options[self._cache_name()] = self._prefill(hook, input_ids, mask)
        rows = self._rows(input_ids)
        try:
            hook.attach()
            found = self.model.generate(rows, attention_mask=self._rows(mask), **options)
        finally:
            hook.detach()
        return found.reshape(len(self.strengths), input_ids.shape[0], -1)

    def _prefill(self, hook: SteerHook, input_ids: Tensor, mask: Tensor) -> Any:
        """The cache of all tokens but the last, which `generate` wants for itself."""
        before, cache = self._lower(input_ids[:, :-1], mask[:, :-1])
        if hook.requests.remembers and self.steering.scope == "prompt":
            last, _ = self._lower(input_ids[:, -1:], mask, copy.deepcopy(cache))
            self._start(hook, input_ids, mask)
            hook.steered(self._rows(torch.cat([before, last], 1)))
            state = hook.state
            _, upper = self._upper(hook, before, input_ids[:, :-1], mask[:, :-1], state)
        else:
            _, upper = self._upper(hook, before, input_ids[:, :-1], mask[:, :-1])
        cache.batch_select_indices(self._rows(torch.arange(len(input_ids), device=mask.device)))
        for i in range(self.layer + 1):
            upper.layers[i] = cache.layers[i]
        return upper

    def _hook(self, batch: int) -> SteerHook:
        base = torch.as_tensor(self.steering.strength, device=self.steering.decoder.device)
        base = base.float().reshape(1, -1).expand(batch, self.steering.decoder.shape[0])
        strengths = torch.cat([s * base for s in self.strengths])
        steering = self.steering.with_strength(strengths)
        return SteerHook(self.model, self.layer, steering, **self.options)

    def _rows(self, x: Tensor) -> Tensor:
        return x.repeat(len(self.strengths), *[1] * (x.dim() - 1))

    def _cache_name(self) -> str:
        names = inspect.signature(self.decoder.forward).parameters
        return "cache" if "cache" in names else "past_key_values"

    def _call(self, input_ids: Tensor, mask: Tensor, cache: Any = None) -> Any:
        places = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        options = {} if cache is None else {self._cache_name(): cache}
        return self.decoder(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=places,
            use_cache=True,
            return_dict=True,
            **options,
        )

    def _lower(self, input_ids: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """(output of the block [B, T, D], the cache of the blocks up to it)."""
        found = {}

        def keep_cache(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found["cache"] = cache_of(kwargs)

        def stop(module: nn.Module, args: tuple, output: Any) -> None:
            found["hidden"] = output[0] if isinstance(output, tuple) else output
            raise _Reached

        block = self.blocks[self.layer]
        handles = [
            block.register_forward_pre_hook(keep_cache, with_kwargs=True),
            block.register_forward_hook(stop),
        ]
        try:
            self._call(input_ids, mask, cache)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found["hidden"], found["cache"]

    def _start(self, hook: SteerHook, input_ids: Tensor, mask: Tensor) -> None:
        hook.sequences.start_call((self._rows(input_ids),), {"attention_mask": self._rows(mask)})

    def _upper(
        self,
        hook: SteerHook,
        hidden: Tensor,
        input_ids: Tensor,
        mask: Tensor,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """(last hidden states [S B, T, D], the cache of the blocks above) of steered `hidden`."""
        self._start(hook, input_ids, mask)
        hook.state = state
        steered = hook.steered(self._rows(hidden))
        with self._lower_blocks_give(steered):
            out = self._call(self._rows(input_ids), self._rows(mask))
        return out.last_hidden_state, cache_of(out)

    @contextmanager
    def _lower_blocks_give(self, hidden: Tensor) -> Iterator[None]:
        """Blocks up to the steered one compute nothing; the last of them gives `hidden`."""

        def give(module: nn.Module, args: tuple, output: Any) -> Any:
            return hidden

        blocks = self.blocks[: self.layer + 1]
        handle = blocks[-1].register_forward_hook(give)
        try:
            for block in blocks:
                block.forward = lambda hidden_states, *args, **kwargs: hidden_states
            yield
        finally:
            handle.remove()
            for block in blocks:
                vars(block).pop("forward", None)


class _Reached(Exception):
    """The block has run; those above need not."""
