"""Prefixes of each depth, and predictions from the end of each loop."""

import pytest
import torch
import torch.nn.functional as F
from recursive_models import WINDOW, assert_same_model, exit_states, logits, tiny, tokens
from test_recursive import relaxed
from torch import nn

from gemma_ext.nn.recursive import (
    ExitHead,
    Plan,
    add_prefixes,
    decoder_layers,
    exit_heads,
    load,
    merged,
    save,
)
from gemma_ext.nn.recursive.exits import final_norm
from gemma_ext.nn.recursive.prefix import attention_of

ALL = ["gemma", "gemma2", "gemma3", "llama", "qwen2", "qwen3", "pythia"]


@pytest.mark.parametrize("kind", ALL)
def test_a_prefix_is_keys_and_values_without_a_place(kind):
    """Against plain attention, from the states that go into the first layer."""
    model = add_prefixes(relaxed(kind, 0), 3)
    _, layers = decoder_layers(model)
    seen = {}
    attention = attention_of(layers[0])
    layers[0].register_forward_pre_hook(lambda m, a: seen.__setitem__("x", a[0]))
    out = "dense" if kind == "pythia" else "o_proj"
    getattr(attention, out).register_forward_pre_hook(lambda m, a: seen.__setitem__("o", a[0]))
    ids = tokens(3 * WINDOW, 1)
    logits(model, ids)
    x = layers[0].input_layernorm(seen["x"])[0]
    config = model.config
    heads, size = config.num_attention_heads, getattr(attention, "head_dim", None)
    size = size or attention.head_size
    if kind == "pythia":
        part = attention.query_key_value(torch.cat([attention.prefix, x]))
        q, k, v = part.view(-1, heads, 3 * size).split(size, -1)
        q, groups = q[3:], 1
    else:
        q = attention.q_proj(x).view(-1, heads, size)
        k, v = (
            p(torch.cat([attention.prefix, x])).view(-1, config.num_key_value_heads, size)
            for p in (attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "k_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        groups = heads // config.num_key_value_heads
    place = torch.arange(x.shape[0])[None]
    rotary = model.base_model.rotary_emb
    kinds = (layers[0].self_attn.layer_type,) if kind == "gemma3" else ()
    cos, sin = (t[0][:, None] for t in rotary(x, place, *kinds))
    q, k = _rotated(q, cos, sin), torch.cat([k[:3], _rotated(k[3:], cos, sin)])
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    score = torch.einsum("qhd,khd->hqk", q, k) * attention.scaling
    if cap := getattr(config, "attn_logit_softcapping", None):
        score = cap * torch.tanh(score / cap)
    gap = place.mT - place
    visible = gap >= 0
    if kind in ("gemma2", "gemma3"):
        visible &= gap < WINDOW
    visible = F.pad(visible, (3, 0), value=True)
    weights = score.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
    torch.testing.assert_close(seen["o"][0], expected, rtol=0, atol=2e-6)


def _rotated(x, cos, sin):
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    one, two = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-two, one], -1) * sin, rest], -1)


@pytest.mark.parametrize("kind", ["gemma2", "qwen3", "pythia"])
def test_prefixes_in_caches_files_and_gradients(kind, tmp_path):
    plain = relaxed(kind)
    ids = tokens(5)
    before = logits(plain, ids)
    assert torch.equal(logits(add_prefixes(plain, 0), ids), before)
    assert Plan.of_model(plain).prefix == 0
    model = add_prefixes(plain, 4)
    size = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".prefix"))
    assert size == 6 * 4 * model.config.hidden_size
    options = {"max_new_tokens": 3 * WINDOW, "do_sample": False, "pad_token_id": 0}
    made = model.generate(ids, **options)
    assert torch.equal(made, model.generate(ids, use_cache=False, **options))
    again = load(save(model, tmp_path))
    assert_same_model(again, model, made)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith(".prefix"))


def test_prefixes_that_are_refused():
    model = add_prefixes(relaxed("llama"), 2)
    with pytest.raises(ValueError, match="expected one without prefixes, got 2"):
        add_prefixes(model, 1)
    with pytest.raises(ValueError, match="expected no prefixes to merge, got 2"):
        merged(model)
    with pytest.raises(ValueError, match="count: expected a number >= 0, got -1"):
        add_prefixes(relaxed("llama"), -1)
    with pytest.raises(TypeError, match="expected attention with k_proj and v_proj"):
        attention_of(nn.Identity())


@pytest.mark.parametrize("kind", ALL)
def test_exits_are_the_states_at_the_ends_of_loops(kind):
    model = relaxed(kind, plan=Plan.of(6, 3, "cycle"))
    ids = tokens()
    ends = {}
    _, layers = decoder_layers(model)
    for depth in (1, 3, 5):
        layers[depth].register_forward_hook(lambda m, a, o, d=depth: ends.__setitem__(d, o))
    states = exit_states(model, ids)
    assert len(states) == 3
    norm = final_norm(model)
    for depth, state in zip((1, 3, 5), states, strict=True):
        found = ends[depth]
        found = found[0] if isinstance(found, tuple) else found
        assert torch.equal(state, norm(found))
    heads = exit_heads(model, {"input_ids": ids})
    for head, state in zip(heads, states, strict=True):
        assert torch.equal(head["e"], state)
        score = F.linear(head["e"], head["c"], head["bias"]) * head["logit_scale"]
        if cap := head["softcap"]:
            score = cap * torch.tanh(score / cap)
    torch.testing.assert_close(score, logits(model, ids), rtol=1e-12, atol=1e-12)
    assert (heads[0]["softcap"] is not None) == (kind == "gemma2")
    (last,) = exit_heads(model, {"input_ids": ids}, early=False)
    assert torch.equal(last["e"], states[-1])


def test_exits_pass_a_coda_and_vanilla_models_have_one():
    model = relaxed("gemma2", plan=Plan.of(6, 2, "middle-cycle"))
    ids = tokens()
    seen = model.model(ids, output_hidden_states=True)
    first, last = exit_states(model, ids)
    assert torch.equal(first, model.model.norm(seen.hidden_states[3]))
    assert torch.equal(last, seen.last_hidden_state)
    (only,) = exit_states(tiny("llama"), ids)
    assert only.shape == (2, 40, 24)


def test_exits_that_are_not_there():
    with pytest.raises(ValueError, match="whose loops have ends"):
        exit_heads(relaxed("llama", plan=Plan.of(6, 2, "sequence")), {"input_ids": tokens()})
    model = relaxed("llama")
    del model.model.norm
    with pytest.raises(TypeError, match="expected a final norm named norm"):
        final_norm(model)


def test_exit_head_changes_the_head_by_a_product():
    weight = torch.randn(13, 6, dtype=torch.float64)
    made = ExitHead(weight, 4)
    states = torch.randn(2, 5, 6, dtype=torch.float64)
    e, c = made(states, weight)
    torch.testing.assert_close(e @ c.mT, states @ weight.mT)
    nn.init.normal_(made.lora_B)
    e, c = made(states, weight)
    expected = states @ (weight + made.lora_B @ made.lora_A).mT
    torch.testing.assert_close(e @ c.mT, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="rank: expected a number >= 1, got 0"):
        ExitHead(weight, 0)


def test_a_head_for_exits_is_not_merged():
    model = relaxed("gemma2")
    model.exit_head = ExitHead(model.get_output_embeddings().weight, 2)
    with pytest.raises(ValueError, match="expected no head for exits, got exit_head"):
        merged(model)
    del model.exit_head
    merged(model)
