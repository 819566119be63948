"""The model with a value head that trl had: a causal LM and v = w . h + b on its last states."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.extras import require
from gemma_ext.nn.ppo import ValueHead
from gemma_ext.nn.ppo.critic import width_of
from gemma_ext.ppo.files import load_value_head


class _Head(nn.Module):
    def __init__(self, summary: ValueHead) -> None:
        super().__init__()
        self.summary = summary


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A policy with its critic in one file, `v_head.summary.*` beside the model's tensors.

    Args:
        pretrained_model: causal LM of transformers.
        head: a fresh one, 0 for every state, by default.

    Example:
        >>> model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
        >>> logits, loss, values = model(input_ids=ids)
    """

    def __init__(self, pretrained_model: nn.Module, head: ValueHead | None = None) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model
        self.v_head = _Head(head or ValueHead(width_of(pretrained_model)))
        self.v_head.to(next(pretrained_model.parameters()).device)

    @classmethod
    def from_pretrained(
        cls, pretrained_model: str | Path | nn.Module, **options: Any
    ) -> AutoModelForCausalLMWithValueHead:
        """Of a model, a hub id, or a folder, with the head in it if there is one.

        Args:
            options: of transformers' `from_pretrained`.
        """
        if isinstance(pretrained_model, nn.Module):
            return cls(pretrained_model)
        require("a model with a value head", "hf", "transformers", "safetensors")
        from transformers import AutoModelForCausalLM

        head = None
        if Path(pretrained_model).is_dir():
            with suppress(ValueError):  # there is none
                head = load_value_head(pretrained_model)
        return cls(AutoModelForCausalLM.from_pretrained(pretrained_model, **options), head)

    def forward(self, **inputs: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """(logits [B, T, V], loss or None, float32 values [B, T])."""
        inputs.pop("past_key_values", None)
        output = self.pretrained_model(**inputs, output_hidden_states=True, return_dict=True)
        return output.logits, output.loss, self.v_head.summary(output.hidden_states[-1])

    def generate(self, *args: Any, **options: Any) -> Any:
        """The model's own."""
        return self.pretrained_model.generate(*args, **options)

    @torch.no_grad()
    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Model and head in one checkpoint, which trl reads, and transformers without the head."""
        state = self.pretrained_model.state_dict() | self.v_head.summary.tensors()
        self.pretrained_model.save_pretrained(folder, state_dict=state, **options)

    @property
    def config(self) -> Any:
        return self.pretrained_model.config
