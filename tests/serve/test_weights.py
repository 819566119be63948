"""What is read off a model of transformers, and what is refused."""

import pytest
import torch
from serve_tiny import OPTIONS, WINDOW, tiny

from gemma_ext.nn.recursive import Plan, make_recursive
from gemma_ext.serve.weights import read_weights


@pytest.mark.parametrize("name", OPTIONS)
def test_vanilla_model_is_one_loop_that_shares_its_tensors(name):
    model = tiny(name)
    weights = read_weights(model)
    assert (weights.loops, weights.depths, weights.vocabulary) == (1, 4, 97)
    assert not weights.prelude
    assert not weights.coda
    decoder = model.get_decoder()
    assert weights.embedding.data_ptr() == decoder.embed_tokens.weight.data_ptr()
    q = decoder.layers[2].self_attn.q_proj.weight
    assert weights.block[2].qkv[0].weight.data_ptr() == q.data_ptr()
    assert weights.block[2].depths == (2,)
    assert all(p.loops is None for layer in weights.block for p in layer.qkv)
    assert (weights.head.data_ptr() == weights.embedding.data_ptr()) == name.startswith("Gemma")


def test_recursive_model_has_its_depths_stacked():
    model = tiny("Gemma2", loops=3, rank=2, layers=6)
    weights = read_weights(model)
    assert (weights.loops, len(weights.block), weights.depths) == (3, 2, 6)
    assert [layer.depths for layer in weights.block] == [(0, 2, 4), (1, 3, 5)]
    down = weights.block[1].down
    assert down.lora_a.shape == (3, 2, 44)
    assert down.lora_b.shape == (3, 32, 2)
    for loop, depth in enumerate((1, 3, 5)):
        own = model.model.layers[depth].mlp.down_proj
        assert torch.equal(down.lora_a[loop], own.lora_A)
        assert torch.equal(down.lora_b[loop], own.lora_B)


def test_loops_without_matrices_have_zeros():
    model = tiny("Llama", layers=4)
    plan = Plan.of(4, 2, ranks={"self_attn.q_proj": 3}, lora_from_loop=1)
    make_recursive(model, plan)
    q, k, _ = read_weights(model).block[0].qkv
    assert not q.lora_a[0].any()
    assert q.lora_a[1].any()
    assert k.lora_a is None


def test_windows_and_angles_belong_to_depths():
    weights = read_weights(tiny("Gemma3Text", loops=2, layers=4))
    assert [layer.window.tolist() for layer in weights.block] == [[WINDOW, 0], [0, WINDOW]]
    assert [layer.rope_of.tolist() for layer in weights.block] == [[0, 1], [1, 0]]
    assert len(weights.ropes) == 2  # 10,000 of sliding layers, 1,000,000 of the others
    assert [layer.window.tolist() for layer in read_weights(tiny("Mistral")).block] == [
        [WINDOW]
    ] * 4
    qwen = read_weights(tiny("Qwen2")).block
    assert [layer.window.tolist() for layer in qwen] == [[0], [WINDOW], [WINDOW], [WINDOW]]


def test_scaled_angles_have_the_models_own_frequencies():
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = tiny("Llama", rope_parameters=rope)
    ((frequencies, scale),) = read_weights(model).ropes
    own = LlamaRotaryEmbedding(model.config)
    assert torch.equal(frequencies, own.inv_freq)
    assert scale == own.attention_scaling
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    assert read_weights(tiny("Llama", rope_parameters=rope)).ropes[0][1] > 1


def test_scale_of_embeddings_is_rounded_as_the_model_does_it():
    model = tiny("Gemma2", dtype=torch.bfloat16)
    ids = torch.tensor([5, 9])
    weights = read_weights(model)
    own = weights.embedding[ids] * weights.embedding_scale
    assert torch.equal(own, model.model.embed_tokens(ids))


def test_dtype_is_the_callers():
    weights = read_weights(tiny("Gemma2", loops=2, rank=2), dtype=torch.bfloat16)
    layer = weights.block[0]
    for tensor in (weights.head, layer.attention_norm, layer.down.lora_a, layer.qkv[1].weight):
        assert tensor.dtype == torch.bfloat16
    assert weights.dtype == torch.bfloat16
    assert weights.device.type == "cpu"


def phi():
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}
    return PhiForCausalLM(PhiConfig(hidden_size=16, intermediate_size=16, **sizes))


def untied():
    model = tiny("Llama", layers=2)
    make_recursive(model, Plan.of(2, 2))
    q = model.model.layers[1].self_attn.q_proj
    q.weight = torch.nn.Parameter(q.weight.clone())
    return model


def biased():
    model = tiny("Llama", layers=1)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(97))
    return model


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (phi, r"expected one of the architectures gemma, .*, qwen3, got phi"),
        (
            lambda: tiny("Gemma3Text", use_bidirectional_attention=True),
            "expected causal attention, got use_bidirectional_attention",
        ),
        (
            lambda: tiny("Llama", hidden_act="relu"),
            "expected activation gelu_pytorch_tanh or silu, got relu",
        ),
        (
            lambda: tiny(
                "Llama",
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            ),
            "expected rope type default, linear, llama3, yarn, got dynamic",
        ),
        (untied, "expected the loops of a layer to share their weights"),
        (biased, "expected a head without bias, got one with a bias"),
    ],
)
def test_what_the_engine_does_not_run_is_refused(make, sentence):
    with pytest.raises(ValueError, match=f"^model: {sentence}"):
        read_weights(make())


def test_adapters_of_peft_are_low_rank_matrices_beside_the_shared_weight():
    peft = pytest.importorskip("peft")
    model = tiny("Llama", layers=2)
    shared = model.model.layers[0].self_attn.q_proj.weight
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    made.add_adapter("more", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["v_proj"]))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random))
    q, k, v = read_weights(made.get_base_model()).block[0].qkv
    assert q.weight.data_ptr() == shared.data_ptr()
    layer = model.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(q.lora_b[0] @ q.lora_a[0], layer.get_delta_weight("default"))
    assert k.lora_a is None
    assert v.lora_a is None  # its adapter is not active
    made.base_model.set_adapter(["default", "more"])
    assert read_weights(made.get_base_model()).block[0].qkv[2].lora_a.shape == (1, 3, 32)
    with made.disable_adapter():
        assert read_weights(made.get_base_model()).block[0].qkv[0].lora_a is None
