"""Activations are those of the model's own modules, and the model stops behind the last."""

import pytest
import torch
from tiny_gemma2 import D, T, tiny_model, tiny_rows

from gemma_ext.sae import capture, find_site, replacing
from gemma_ext.sae.sites import blocks


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def hidden_states(model, ids):
    return model.model(input_ids=ids, output_hidden_states=True).hidden_states


def test_residual_stream_is_the_models_hidden_states(model):
    ids = tiny_rows(3).long()
    states = hidden_states(model, ids)
    names = ["0", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", 1, "model.layers.0.output"]
    found = capture(model, ids, [find_site(model, name) for name in names])
    for got, state in zip(found, (1, 1, 2, 2, 1), strict=True):
        torch.testing.assert_close(got, states[state])


def test_branches_add_up_to_the_stream(model):
    """resid_post = resid_pre + attention's part + the MLP's part, each behind its norm."""
    ids = tiny_rows(2).long()
    names = [
        f"blocks.2.{h}" for h in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "attn.hook_z")
    ]
    before, attention, mlp, z = capture(model, ids, [find_site(model, n) for n in names])
    (after,) = capture(model, ids, [find_site(model, "2")])
    torch.testing.assert_close(before + attention + mlp, after)
    layer = model.model.layers[2]
    normed = layer.post_attention_layernorm(layer.self_attn.o_proj(z))
    torch.testing.assert_close(normed, attention)
    (inside,) = capture(model, ids, [find_site(model, "blocks.2.hook_mlp_in")])
    torch.testing.assert_close(layer.post_feedforward_layernorm(layer.mlp(inside)), mlp)


def test_models_without_a_second_norm():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61, hidden_size=D, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    ids = tiny_rows(2).long()
    names = [f"blocks.1.{h}" for h in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")]
    before, attention, mlp = capture(llama, ids, [find_site(llama, n) for n in names])
    torch.testing.assert_close(before + attention + mlp, hidden(llama, ids))


def hidden(llama, ids):
    return capture(llama, ids, [find_site(llama, "1")])[0]


def test_later_blocks_are_not_run(model):
    ran = []
    handles = [
        block.register_forward_hook(lambda *a, i=i: ran.append(i))
        for i, block in enumerate(blocks(model))
    ]
    capture(model, tiny_rows(1).long(), [find_site(model, "blocks.1.hook_attn_out")])
    for handle in handles:
        handle.remove()
    assert ran == [0]


def test_hooks_are_gone_afterwards_also_after_errors(model):
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    capture(model, tiny_rows(1).long(), [find_site(model, "1")])

    def fail():
        with replacing(find_site(model, "1"), lambda x: x):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert after == count


@pytest.mark.parametrize(
    "name", ["1", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_in"]
)
def test_a_replaced_activation_is_what_the_model_goes_on_with(model, name):
    ids = tiny_rows(2).long()
    site = find_site(model, name)
    plain = model(ids).logits
    with replacing(site, lambda x: x):
        assert torch.equal(model(ids).logits, plain)
    with replacing(site, lambda x: x + 1):
        assert not torch.allclose(model(ids).logits, plain)
    assert torch.equal(model(ids).logits, plain)


def test_unknown_sites_are_refused(model):
    with pytest.raises(ValueError, match="site: expected a block below 3, got 7"):
        find_site(model, "7")
    with pytest.raises(ValueError, match=r"site: expected one of hook_resid_post.*got 'hook_q'"):
        find_site(model, "blocks.1.hook_q")
    with pytest.raises(ValueError, match=r"site: expected a block's hook.*'layers\.9\.mlp'"):
        find_site(model, "layers.9.mlp")
    model.unused = torch.nn.Linear(1, 1)
    unused = find_site(model, "unused")
    with pytest.raises(ValueError, match="site: the model's forward does not reach unused"):
        capture(model, tiny_rows(1).long(), [unused])
    del model.unused
    lonely = tiny_model()
    lonely.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="model: expected one list of 5 blocks, got 0"):
        find_site(lonely, "1")
    with pytest.raises(ValueError, match="model: expected one of transformers, got Linear"):
        find_site(torch.nn.Linear(1, 1), 1)


def test_shapes(model):
    (x,) = capture(model, tiny_rows(2).long(), [find_site(model, "layers.0.mlp.input")])
    assert x.shape == (2, T, D)
