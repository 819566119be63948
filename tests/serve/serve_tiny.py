"""Tiny random models of every architecture that the engine runs, and their forward in float64."""

from __future__ import annotations

import torch
import transformers
from torch.overrides import TorchFunctionMode

from gemma_ext.nn.recursive import Plan, make_recursive

WINDOW = 5
VOCABULARY = 97
SLIDING = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
OPTIONS = {
    "Gemma": {},
    "Gemma2": {"sliding_window": WINDOW},
    "Gemma3Text": {"sliding_window": WINDOW, "layer_types": SLIDING, "query_pre_attn_scalar": 8},
    "Llama": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "Qwen3": {},
}
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def tiny(
    name: str,
    *,
    loops: int = 1,
    rank: int = 0,
    layers: int = 4,
    order: str = "cycle",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: object,
):
    """A model with random weights, norms and depth LoRAs; deviations that make it opinionated."""
    config = getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "attn_implementation": "eager",
            "pad_token_id": 0,
            **OPTIONS[name],
            **options,
        }
    )
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    model = model.to(dtype).eval()
    if loops > 1 or order != "cycle":
        ranks = dict.fromkeys(LINEARS, rank)
        make_recursive(model, Plan.of(layers, loops, order, ranks=ranks))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            scales = "norm" in key and not name.startswith("Gemma")  # Gemma adds 1 itself
            parameter.copy_(0.25 * noise + scales)
    return model


class Double(TorchFunctionMode):
    """float64 wherever `transformers` asks for float32: in norms, softmax and angles."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {
            name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()
        }
        return function(*args, **kwargs)
