"""Steering inside a language model: a hook on one block, for generation and for scoring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.nn._blocks import Sequences, decoder_layers, site_module
from gemma_ext.ops.sae import Requests, Steering, fresh_state, steer
from gemma_ext.ops.sae.steer import packed
from gemma_ext.ops.sae.steer_requests import PROMPT

POSITIONS = ("all", "prompt", "response")


@contextmanager
def steer_hook(
    model: nn.Module,
    layer: int,
    steering: Steering | Sequence[Steering | None] | Requests,
    *,
    site: str = "resid_post",
    positions: str = "all",
    prompt_length: int | Tensor | None = None,
    attention_mask: Tensor | None = None,
    skip_first: bool = True,
    impl: str = "auto",
) -> Iterator[SteerHook]:
    """Steers a transformers decoder inside the block; leaves it as it was, also after an error.

    Works with `generate`, with a cache or without, and with padding on either side: padding
    neither opens gates nor changes. A call without a past starts new sequences; gates of
    "per_input" remember through the calls that go on. Beams are reordered behind the hook's back:
    there only the scope "prompt" is what it says.

    Args:
        model: a causal language model of transformers, or its decoder.
        layer: block; hidden_states[layer + 1] is its output.
        steering: as `gemma_ext.ops.sae.steer` takes it, one request a sequence.
        site: "resid_post", the output of the block (SAELens: blocks.L.hook_resid_post);
            "resid_mid", the residual stream between attention and MLP; "mlp_in", what the MLP
            reads, which never enters the residual stream itself. By meaning, not by the name of a
            module: in Gemma-2 and 3 `post_attention_layernorm` writes to resid_mid, in Llama it
            makes mlp_in.
        positions: tokens that change: "all", those of the "prompt", or of the "response".
        prompt_length: columns of the prompt, a number or int64 [B]; by default those of the call
            that starts the sequences. Needed where that call holds more: in teacher-forced scoring
            of a response, and in generation without a cache.
        attention_mask: [B, columns] of the prompt, where the model is called with none of two
            dimensions; columns behind it are no padding.
        skip_first: the first token of a sequence, an attention sink with activations of its own
            (BOS), is neither read nor changed.
        impl: as `steer`.

    Yields:
        The hook; its `state` is that of the gates.

    Raises:
        ValueError, RuntimeError: a block, site or call that does not fit.

    Example:
        >>> toxic = Steering(decoder[ids], -8.0, encoder[ids], bias[ids], threshold[ids],
        ...                  gate="per_token")
        >>> with steer_hook(model, 10, toxic):
        ...     model.generate(**tokens, max_new_tokens=20)
    """
    hook = SteerHook(
        model,
        layer,
        steering,
        site=site,
        positions=positions,
        prompt_length=prompt_length,
        attention_mask=attention_mask,
        skip_first=skip_first,
        impl=impl,
    )
    try:
        hook.attach()
        yield hook
    finally:
        hook.detach()


class SteerHook:
    """What `steer_hook` attaches; see there."""

    def __init__(
        self,
        model: nn.Module,
        layer: int,
        steering: Steering | Sequence[Steering | None] | Requests,
        *,
        site: str = "resid_post",
        positions: str = "all",
        prompt_length: int | Tensor | None = None,
        attention_mask: Tensor | None = None,
        skip_first: bool = True,
        impl: str = "auto",
    ) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"expected positions to be all, prompt or response, got {positions!r}")
        self.decoder, self.blocks = decoder_layers(model)
        self.module, self.place = site_module(self.decoder, self.blocks, layer, site)
        self.steering = steering
        self.requests = packed(steering)
        self.positions = positions
        self.prompt_length = prompt_length
        self.sequences = Sequences(attention_mask, skip_first, self.requests.remembers)
        self.impl = impl
        self.state: Tensor | None = None
        self.handles: list[Any] = []

    def attach(self) -> None:
        before = self.decoder.register_forward_pre_hook(self._start_call, with_kwargs=True)
        self.handles.append(before)
        if self.place == "output":
            # first of all hooks: what transformers records as hidden_states is steered
            self.handles.append(self.module.register_forward_hook(self._on_output, prepend=True))
        else:
            self.handles.append(self.module.register_forward_pre_hook(self._on_input))

    def detach(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _start_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.sequences.start_call(args, kwargs)
        if self.sequences.start == 0:
            self.state = None

    def _on_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.steered(output[0]), *output[1:])
        return self.steered(output)

    def _on_input(self, module: nn.Module, args: tuple) -> tuple | None:
        if self.place == "input":
            return (self.steered(args[0]), *args[1:])
        # the block keeps this very tensor as its residual
        args[0].copy_(self.steered(args[0].clone()))
        return None

    def steered(self, x: Tensor) -> Tensor:
        """x [B, T, D] of the call that has started."""
        batch = x.shape[0]
        reads = self.sequences.readable(x.device)
        writes = reads & self._at_positions(x.device)
        if self.state is None:
            self.state = fresh_state(batch, x.device)
            self._decide_by_prompt(x, reads)
        # a graph of its own for each call where the steering is learned
        given = self.steering if self.requests.requires_grad else self.requests
        options = {"state": self.state, "impl": self.impl}
        return steer(x, given, reads=reads, writes=writes, **options)

    def _at_positions(self, device: torch.device) -> Tensor:
        """bool [1 or B, T]: columns that may change."""
        columns = self.sequences.columns(device)
        if self.positions == "all":
            return torch.ones_like(columns, dtype=torch.bool)
        inside = columns < self._prompt_end(device)
        return inside if self.positions == "prompt" else ~inside

    def _prompt_end(self, device: torch.device) -> Tensor:
        """[1 or B, 1]."""
        end = self.sequences.first_end if self.prompt_length is None else self.prompt_length
        return torch.as_tensor(end, device=device).reshape(-1, 1)

    def _decide_by_prompt(self, x: Tensor, reads: Tensor) -> None:
        """Of a call that holds more than the prompt, gates of that scope see the prompt alone."""
        if self.prompt_length is None or not self.requests.remembers:
            return
        prompt = reads & (self.sequences.columns(x.device) < self._prompt_end(x.device))
        decided = self.state.clone()
        steer(x, self.requests, state=decided, reads=prompt, impl=self.impl)
        by_prompt = self.requests.gates[:, 0] == PROMPT
        self.state = torch.where(by_prompt, decided, self.state)
