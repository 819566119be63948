"""Causal language models of a few thousand parameters, and fine-tunes of them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

VOCAB = 61


def gemma2(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Gemma-2 with tied embeddings whose logits the cap of 30 bends."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=4,
        query_pre_attn_scalar=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.normal_(0, 1.0 if "embed" in name else parameter.shape[1] ** -0.5)
    return model.to(dtype)


def tuned(model: nn.Module, seed: int, size: float = 0.05) -> nn.Module:
    """A copy with noise on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(size * noise.to(parameter.dtype))
    return copied


def batch(seed: int = 0, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Token ids, the last row padded at its end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}
