"""The pocket sizes and the Gemma-2 of each: every feature of the architecture, only small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_ext.pocket.tokenizer import BOS_ID, EOS_ID, PAD_ID

if TYPE_CHECKING:
    from transformers import Gemma2Config, Gemma2ForCausalLM


@dataclass(frozen=True)
class PocketSize:
    """Shape, text budget and training recipe of one size.

    Attributes:
        vocab_size: V.
        hidden_size: D.
        layers: L, alternating sliding-window and full attention, as Gemma 2 does.
        heads, kv_heads, head_dim: grouped-query attention.
        intermediate_size: width of the GeGLU.
        context: tokens per training sequence.
        sliding_window: window of the even layers, below `context` so that it bites.
        corpus_bytes: bytes of training source, a tenth of it held out on top; None for all.
        steps, batch: optimiser steps, and sequences in each.
        learning_rate: peak of a linear warm-up and cosine decay.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    context: int
    sliding_window: int
    corpus_bytes: int | None
    steps: int
    batch: int
    learning_rate: float


SIZES = {
    "nano": PocketSize(
        vocab_size=2048,
        hidden_size=128,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=32,
        intermediate_size=384,
        context=128,
        sliding_window=48,
        corpus_bytes=1_200_000,
        steps=180,
        batch=16,
        learning_rate=1e-2,
    ),
    "small": PocketSize(
        vocab_size=16384,
        hidden_size=192,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=48,
        intermediate_size=576,
        context=256,
        sliding_window=96,
        corpus_bytes=3_000_000,
        steps=300,
        batch=8,
        learning_rate=1e-2,
    ),
}


def pocket_size(size: str) -> PocketSize:
    """The recipe named `size`.

    Raises:
        ValueError: there is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"size: expected one of {sorted(SIZES)}, got {size!r}")
    return SIZES[size]


def build_config(size: PocketSize) -> Gemma2Config:
    """Soft-caps 50 and 30, sliding window, grouped queries, tied embeddings, GeGLU."""
    from transformers import Gemma2Config

    return Gemma2Config(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        query_pre_attn_scalar=size.head_dim,
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=4 * size.context,
        sliding_window=size.sliding_window,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=BOS_ID,
        attn_implementation="eager",
    )


def build_model(size: PocketSize, seed: int = 0) -> Gemma2ForCausalLM:
    """A freshly initialised model in float32; the caller's random state is left as it was."""
    import torch
    from transformers import Gemma2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gemma2ForCausalLM(build_config(size))
