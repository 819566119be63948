"""Causal language models of a few thousand parameters and comparison of their gradients."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import nn

VOCAB = 101
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "attn_implementation": "eager",
}


def build(name: str, seed: int = 0, **options) -> nn.Module:
    """A randomly initialised `name`ForCausalLM in evaluation mode (no dropout)."""
    torch.manual_seed(seed)
    cls = getattr(transformers, f"{name}ForCausalLM")
    return cls(cls.config_class(**{**BASE, **options})).eval()


def gemma2(seed: int = 0, **options) -> nn.Module:
    """A Gemma-2 whose logits reach well past its cap of 30."""
    model = build("Gemma2", seed, **options)
    with torch.no_grad():
        model.model.norm.weight.fill_(300.0)
    return model


def batch(seed: int = 0, rows: int = 2, length: int = 13) -> dict[str, torch.Tensor]:
    """Token ids and labels with a masked prompt and a padded end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[-1, -2:] = -100
    return {"input_ids": ids, "labels": labels}


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def loss_and_gradients(model: nn.Module, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The first output of `model` and the gradient of every parameter that has one."""
    model.zero_grad()
    loss = model(**inputs)[0]
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same_training(got, expected, tolerance: float = 1e-5) -> None:
    """Equal losses, and gradients within `tolerance` of each parameter's own norm.

    Gradients that vanish in exact arithmetic (a key bias under a softmax) hold rounding only, so
    the floor of the comparison is a small part of the whole gradient's norm.
    """
    (loss, gradients), (true_loss, true_gradients) = got, expected
    assert torch.isfinite(loss)
    assert abs(float(loss) - float(true_loss)) <= tolerance * max(1.0, abs(float(true_loss)))
    assert gradients.keys() == true_gradients.keys()
    total = torch.stack([g.double().norm() for g in true_gradients.values()]).norm()
    assert total > 0
    for name, true in true_gradients.items():
        error = (gradients[name].double() - true.double()).norm()
        assert error <= tolerance * (true.double().norm() + 0.1 * total), (name, error, true.norm())
