"""Every architecture trains as without the patch: same loss, same gradient of every parameter."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import (
    BASE,
    VOCAB,
    assert_same_training,
    batch,
    build,
    clone,
    gemma2,
    loss_and_gradients,
)

from gemma_ext.integrations.transformers import patch

# What each stands for: plain heads, tied heads, soft-caps (Gemma 2), multiplied and divided logits
# (Cohere, Granite, Falcon H1), a bias in the head (Phi), router losses (Mixtral, Qwen3 MoE), other
# names of the head (GPT-NeoX, GPT-2) and post-processing inside the head (BERT-like).
ARCHITECTURES = {
    "Gemma": {},
    "Gemma3": {"final_logit_softcapping": 5.0},
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {},
    "Phi": {},
    "Phi3": {},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "FalconH1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4},
    "RecurrentGemma": {"logits_soft_cap": 5.0},
    "Mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "GPTNeoX": {},
    "ModernBertDecoder": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


SIDES = ("layers", "attention_heads", "ffn_dim")


def model_of(name: str):
    model = build(name, **ARCHITECTURES[name])
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            # random initialisation has flat logits, under which a wrong scale would hardly show
            parameter.normal_(std=1.0)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matches_eager(name, impl):
    model = model_of(name)
    expected = loss_and_gradients(clone(model), **batch())
    patch(model, impl=impl)
    assert_same_training(loss_and_gradients(model, **batch()), expected)


@pytest.mark.parametrize("name", ["Cohere", "Llama", "Phi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_matches_eager_in_half_precision(name, dtype, impl):
    model = model_of(name).to(dtype)
    expected = loss_and_gradients(clone(model), **batch())
    patch(model, impl=impl)
    assert_same_training(loss_and_gradients(model, **batch()), expected, tolerance=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gemma2_past_its_cap(dtype, tied, impl):
    model = gemma2(tie_word_embeddings=tied)
    with torch.no_grad():
        cap, model.config.final_logit_softcapping = model.config.final_logit_softcapping, None
        assert model(**batch()).logits.abs().max() > 60
        model.config.final_logit_softcapping = cap
    model = model.to(dtype)
    expected = loss_and_gradients(clone(model), **batch())
    patch(model, impl=impl)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_same_training(loss_and_gradients(model, **batch()), expected, tolerance)


BART_FAMILY = (
    "BartForConditionalGeneration",
    "BigBirdPegasusForConditionalGeneration",
    "BlenderbotForConditionalGeneration",
    "BlenderbotSmallForConditionalGeneration",
    "LEDForConditionalGeneration",
    "MarianMTModel",
    "MBartForConditionalGeneration",
    "MvpForConditionalGeneration",
    "PegasusForConditionalGeneration",
    "PLBartForConditionalGeneration",
)


@pytest.mark.parametrize("name", BART_FAMILY)
def test_bart_family_with_a_bias_of_its_logits(name, impl):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in SIDES}
    # decoder_start_token_id: shifts the labels to the decoder's inputs
    options = {"d_model": 32, "decoder_start_token_id": 1, "attention_window": 4}
    model = cls(cls.config_class(**{**BASE, **sizes, **options})).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=1.0)
        model.final_logits_bias.copy_(torch.linspace(-3, 3, VOCAB))
    expected = loss_and_gradients(clone(model), **batch())
    patch(model, impl=impl)
    assert_same_training(loss_and_gradients(model, **batch()), expected)
    assert model(**batch()).logits is None


def test_router_loss_is_part_of_the_loss(impl):
    model = build("Mixtral", num_local_experts=4, output_router_logits=True)
    patched = patch(clone(model), impl=impl)
    output = patched(**batch())
    assert output.aux_loss > 0
    model.config.output_router_logits = False
    model.router_aux_loss_coef = 0.0
    bare = model(**batch())
    expected = bare.loss + patched.router_aux_loss_coef * output.aux_loss
    torch.testing.assert_close(output.loss, expected)
