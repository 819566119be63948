"""Decoders of every supported kind with a few thousand random parameters."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from gemma_ext.nn.recursive._build import build

V, WINDOW = 61, 8
_COMMON = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 10}
_GEMMA = {**_GROUPED, "query_pre_attn_scalar": 10, "sliding_window": WINDOW}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", _GROUPED),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3", {**_GEMMA, "layer_types": None}),
    "llama": ("Llama", {**_GROUPED, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", _GROUPED),
    "pythia": ("GPTNeoX", {}),
}


def tiny(kind: str, layers: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model whose every parameter is random, in evaluation mode."""
    name, options = KINDS[kind]
    if kind == "gemma3":
        types = ["sliding_attention", "sliding_attention", "full_attention"]
        options = {**options, "layer_types": [types[i % 3] for i in range(layers)]}
        config_class = transformers.Gemma3TextConfig
    else:
        config_class = getattr(transformers, f"{name}Config")
    config = config_class(**_COMMON, **options, num_hidden_layers=layers)
    cls = getattr(transformers, f"{name}ForCausalLM")
    generator = torch.Generator().manual_seed(seed)
    state = {}
    with torch.device("meta"):
        shapes = {key: t.shape for key, t in cls(config).state_dict().items()}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        one = "norm.weight" in key and not kind.startswith("gemma")
        state[key] = ((1.0 if one else 0.0) + noise * 0.2).to(dtype)
    if config.tie_word_embeddings:
        state = {k: t for k, t in state.items() if k not in ("lm_head.weight", "embed_out.weight")}
    return build(cls, config, state)


def tokens(count: int = 40, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, V, (batch, count), generator=generator)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def exit_states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """[batch, T, D] that the head is to read at the end of each loop."""
    from gemma_ext.nn.recursive import Plan
    from gemma_ext.nn.recursive.exits import final_norm

    seen = model.base_model(ids, use_cache=False, output_hidden_states=True)
    ends = Plan.of_model(model).exits()[:-1]
    return [*(final_norm(model)(seen.hidden_states[e]) for e in ends), seen.last_hidden_state]


def assert_same_model(one: Any, other: Any, ids: torch.Tensor) -> None:
    """Equal parameters, and logits equal up to where in memory the parameters lie."""
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    # the eager attention of transformers takes its softmax in float32
    torch.testing.assert_close(logits(one, ids), logits(other, ids), rtol=0, atol=2e-6)


def equal_norms(model: Any) -> Any:
    """Gives all layers the norms of the first, which tying would otherwise change."""
    from gemma_ext.nn.recursive import decoder_layers

    _, layers = decoder_layers(model)
    for layer in layers:
        for key, value in layer.named_parameters():
            if "norm" in key or key.endswith("bias"):
                value.data = dict(layers[0].named_parameters())[key].data.clone()
    return model
