"""Parents, references and responses small enough to be checked in float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from gemma_ext.nn.ppo import Sequences
from gemma_ext.pocket import SIZES
from gemma_ext.pocket.model import build_config

VOCAB = 67


def model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A Gemma-2 of a few thousand parameters, soft-caps, sliding window and tied head on."""
    from transformers import Gemma2ForCausalLM

    size = replace(
        SIZES["nano"],
        vocab_size=VOCAB,
        hidden_size=32,
        layers=2,
        head_dim=8,
        intermediate_size=48,
        context=32,
        sliding_window=8,
    )
    config = build_config(size)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Gemma2ForCausalLM(config)
        for parameter in made.parameters():
            parameter.data.normal_(std=0.3)
    return made.to(dtype).eval()


def near(parent: nn.Module, seed: int, by: float = 0.02) -> nn.Module:
    """Another model a small random step away."""
    other = copy.deepcopy(parent)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        step = torch.randn(parameter.shape, generator=generator) * by
        parameter.data.add_(step.to(parameter.dtype))
    return other


def heads_only(count: int, seed: int = 0) -> list[nn.Module]:
    """Models of one body whose logits are linear in what they differ in: the head, no cap."""
    changes = {"tie_word_embeddings": False, "final_logit_softcapping": None}
    first = model(seed, **changes)
    made = [first]
    for k in range(1, count):
        other = copy.deepcopy(first)
        generator = torch.Generator().manual_seed(100 + k)
        head = other.lm_head.weight
        head.data.add_(torch.randn(head.shape, generator=generator) * 0.1)
        made.append(other)
    return made


def responses(rows: int = 5, seed: int = 3) -> Sequences:
    """Prompts of 1 to 4 tokens and responses of 1 to 6, in no order of lengths."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(4, VOCAB, (rows, 4), generator=generator)
    starts = torch.arange(rows) % 4
    mask = torch.arange(4) >= starts.unsqueeze(1)
    answers = torch.randint(4, VOCAB, (rows, 6), generator=generator)
    lengths = 1 + torch.randperm(rows, generator=generator) % 6
    return Sequences.of_lengths(prompts * mask, mask, answers, lengths)


@torch.no_grad()
def logits(of: nn.Module, sequences: Sequences) -> torch.Tensor:
    """float64 [N, V] of the response's tokens, from the model's own forward."""
    out = of(
        input_ids=sequences.ids,
        attention_mask=sequences.mask,
        position_ids=sequences.position_ids,
        use_cache=False,
    ).logits
    return sequences.hidden_rows(out).double()
