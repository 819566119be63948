"""What attention layers of transformers compute, token by token through pages."""

from __future__ import annotations

import pytest
import torch
import transformers
from depth_pages import IMPLS, ints

from gemma_ext.ops.depth_batching import paged_attn_mixed_depth, rope_kv_write
from gemma_ext.testing import assert_close

TOKENS = 37
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "attn_implementation": "eager",
}
LIMITS = {torch.float64: 2e-7, torch.float32: 1e-6}  # softmax there is float32 in float64 too
GEMMA2 = {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 3}


def model_of(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    if name == "gemma2":
        config = transformers.Gemma2Config(**SHAPE, **GEMMA2)
        model = transformers.Gemma2ForCausalLM(config)
    else:
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SHAPE))
    for name, x in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(x)
        elif "proj" in name:
            torch.nn.init.normal_(x, std=0.3)
    return model.to(dtype).eval()


def recorded(model):
    """Per layer: what goes through the projections, and the tables of angles [T, 2, hd / 2]."""
    seen: list[dict] = [{} for _ in model.model.layers]
    hooks = []
    for own, layer in zip(seen, model.model.layers, strict=True):
        attention = layer.self_attn
        for name in "qkv":
            hooks.append(
                getattr(attention, f"{name}_proj").register_forward_hook(
                    lambda _, __, out, own=own, name=name: own.update({name: out[0]})
                )
            )
        hooks.append(
            attention.o_proj.register_forward_pre_hook(
                lambda _, given, own=own: own.update(out=given[0][0])
            )
        )

        def angles(_, args, kwargs, own=own):
            table = kwargs.get("position_embeddings") or args[1]
            half = table[0].shape[-1] // 2
            own.update(rope=torch.stack([x[0, :, :half] for x in table], 1))

        hooks.append(attention.register_forward_pre_hook(angles, with_kwargs=True))
    with torch.no_grad():
        model(torch.arange(TOKENS)[None] % 50, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@pytest.mark.parametrize("impl", IMPLS)
def test_layers_of_models(impl, name, dtype):
    """Two layers as the two loops of one, in chunks; soft-cap, window, norms, angles by layer."""
    model = model_of(name, dtype)
    seen = recorded(model)
    layers = [layer.self_attn for layer in model.model.layers]
    pool = torch.full((2, 3, 2, 2, 16, 8), float("nan"), dtype=dtype)
    tables = ints(2, 0, 1)[None]
    depth_of, window = ints(1, 0), ints(5, 0)
    options = {"rope": torch.stack([own["rope"] for own in seen]), "rope_of": ints(0, 1)}
    if name == "gemma3":
        for which in ("q_norm", "k_norm"):
            weights = [getattr(layer, which).weight.detach() for layer in layers]
            options[which] = torch.stack(weights)
        options.update(eps=model.config.rms_norm_eps, plus_one=True)
    got = [[], []]
    for first in range(0, TOKENS, 10):  # rows of both loops in one launch
        chunk = range(first, min(first + 10, TOKENS))
        rows = [(own, t) for own in (0, 1) for t in chunk]
        q, k, v = (
            torch.stack([seen[own][x][t] for own, t in rows]).unflatten(1, (-1, 8)) for x in "qkv"
        )
        loop, pos = ints(*(own for own, _ in rows)), ints(*(t for _, t in rows))
        places = tables, torch.zeros_like(pos), pos, loop, depth_of
        q = rope_kv_write(q, k, v, pool, *places, **options, impl=impl)
        out = paged_attn_mixed_depth(
            q, pool, *places, window=window, scale=layers[0].scaling,
            softcap=model.config.attn_logit_softcapping, impl=impl,
        )  # fmt: skip
        for own in (0, 1):
            got[own].append(out[loop == own].flatten(1))
    for own in (0, 1):
        assert_close(torch.cat(got[own]), seen[own]["out"], rel=LIMITS[dtype])
