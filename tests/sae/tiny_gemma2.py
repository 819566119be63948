"""A Gemma-2 of a few thousand parameters and rows of random tokens."""

import torch

V, D, T = 61, 24, 16


def tiny_model(seed=0):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=64,
        sliding_window=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).eval()


def tiny_rows(rows=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (rows, T), generator=generator, dtype=torch.int32)
    ids[:, 0] = 2
    return ids
