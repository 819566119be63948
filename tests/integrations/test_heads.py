"""Heads other than a plain projection: adapters, frozen, replaced, quantised, of another dtype."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
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
from torch import nn
from transformers import BertForSequenceClassification, MobileBertConfig, MobileBertForMaskedLM

from gemma_ext.integrations.transformers import patch, unpatch
from gemma_ext.nn._defer_head import defer_head
from gemma_ext.nn._deferred_logits import DeferredLogitsError, LossOptions

BACKBONE = ["q_proj", "v_proj"]


def with_lora(model, **options):
    """`model` under LoRA, with adapters that already do something."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model


def assert_patched_equals_eager(model, impl, tolerance=1e-5):
    expected = loss_and_gradients(clone(model), **batch())
    assert patch(model, impl=impl) is model
    assert model(**batch()).logits is None
    got = loss_and_gradients(model, **batch())
    assert_same_training(got, expected, tolerance)
    unpatch(model)
    assert model(**batch()).logits is not None
    return got[1]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lora_on_the_backbone_leaves_the_head_frozen(tied, impl):
    model = with_lora(gemma2(tie_word_embeddings=tied), target_modules=BACKBONE)
    gradients = assert_patched_equals_eager(model, impl)
    assert all("lora" in name for name in gradients)


@pytest.mark.parametrize("name", ["Gemma2", "Phi", "Cohere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lora_on_the_head(name, dtype, impl):
    model = gemma2(tie_word_embeddings=False) if name == "Gemma2" else build(name)
    model = with_lora(model.to(dtype), target_modules=[*BACKBONE, "lm_head"])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    gradients = assert_patched_equals_eager(model, impl, tolerance)
    assert any("lm_head.lora_B" in name for name in gradients)


def test_lora_on_the_head_with_dropout(impl):
    model = with_lora(
        gemma2(tie_word_embeddings=False), target_modules=["lm_head"], lora_dropout=0.3
    ).train()
    torch.manual_seed(5)
    expected = loss_and_gradients(clone(model), **batch())
    patch(model, impl=impl)
    torch.manual_seed(5)
    assert_same_training(loss_and_gradients(model, **batch()), expected)


def test_two_adapters_on_the_head(impl):
    model = with_lora(gemma2(tie_word_embeddings=False), target_modules=["lm_head"], lora_bias=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    assert_patched_equals_eager(model, impl)


def test_disabled_and_merged_adapters(impl):
    model = with_lora(gemma2(tie_word_embeddings=False), target_modules=["lm_head"])
    with torch.no_grad(), model.disable_adapter():
        expected = model(**batch()).loss
        torch.testing.assert_close(patch(model, impl=impl)(**batch()).loss, expected)
    unpatch(model)
    model.merge_adapter()
    with torch.no_grad():
        expected = model(**batch()).loss
        torch.testing.assert_close(patch(model, impl=impl)(**batch()).loss, expected)


def test_fully_trained_copy_of_the_head(impl):
    model = gemma2(tie_word_embeddings=False)
    model = with_lora(model, target_modules=BACKBONE, modules_to_save=["lm_head"])
    gradients = assert_patched_equals_eager(model, impl)
    assert any("lm_head.modules_to_save" in name for name in gradients)


def test_dora_on_the_head_is_refused(impl):
    model = gemma2(tie_word_embeddings=False)
    model = patch(with_lora(model, target_modules=["lm_head"], use_dora=True), impl=impl)
    with pytest.raises((AttributeError, NotImplementedError), match="which has no fused form"):
        model(**batch())


def test_dora_on_the_backbone(impl):
    model = with_lora(gemma2(), target_modules=BACKBONE, use_dora=True)
    assert_patched_equals_eager(model, impl)


def test_head_without_gradient(impl):
    model = gemma2(tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    gradients = assert_patched_equals_eager(model, impl)
    assert "lm_head.weight" not in gradients


def test_hidden_states_of_another_dtype_are_cast(impl):
    model = gemma2(tie_word_embeddings=False).bfloat16()
    model.model.float()
    expected = clone(model).float()(**batch()).loss
    with pytest.raises(RuntimeError):
        model(**batch())
    loss = patch(model, impl=impl)(**batch()).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert model.lm_head.weight.grad.dtype == torch.bfloat16
    assert model.model.embed_tokens.weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantised_head_is_refused(impl):
    model = patch(gemma2(tie_word_embeddings=False), impl=impl)
    model.lm_head = torch.ao.nn.quantized.dynamic.Linear(32, 101, bias_=False)
    with pytest.raises(TypeError, match="a quantised head has no fused loss"):
        model(**batch())


class Matmul(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class Bare(nn.Module):
    def forward(self, x):
        return x.repeat(1, 1, 4)[..., :VOCAB]


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (Matmul(32, VOCAB, bias=False), r"a product by F\.linear, got Matmul"),
        (nn.Embedding(VOCAB, 32), r"a projection with a \[V, D\] weight, got Embedding, a lookup"),
        (nn.Sequential(nn.Linear(32, VOCAB)), "got Sequential, a module of Linear"),
        (nn.ModuleList([nn.GELU(), nn.Linear(32, VOCAB)]), "got ModuleList, a module of GELU, Lin"),
        (Bare(), "got Bare, a module without a weight"),
        (nn.LayerNorm(32), "got LayerNorm"),
    ],
)
def test_other_kinds_of_heads_are_refused_by_name(head, kind, impl):
    model = patch(gemma2(tie_word_embeddings=False), impl=impl)
    model.lm_head = head
    with pytest.raises(TypeError, match=f"{kind}.*; unpatch the model to train it") as refusal:
        model(**batch())
    assert "quantised" not in str(refusal.value)


def test_offloaded_head_is_refused(impl):
    model = gemma2(tie_word_embeddings=False)
    cpu_offload(model)
    with pytest.raises(TypeError, match=r"to be in memory during the loss.*keep the head out of"):
        patch(model, impl=impl)(**batch())
    assert unpatch(model)(**batch()).logits is not None


@pytest.mark.parametrize("patched_first", [True, False])
def test_offloaded_backbone_below_a_head_in_memory(patched_first, impl):
    model = gemma2(tie_word_embeddings=False)
    expected = model(**batch()).loss
    if patched_first:
        patch(model, impl=impl)
    cpu_offload(model.model)
    output = patch(model, impl=impl)(**batch())
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)


def test_integer_and_absent_weights_are_refused():
    head = nn.Linear(4, 9, bias=False)
    hidden, options = torch.randn(3, 4), LossOptions("Toy")
    with defer_head(head, options):
        head.weight = nn.Parameter(torch.zeros(9, 4, dtype=torch.int8), requires_grad=False)
        with pytest.raises(TypeError, match=r"floating weight, got torch\.int8"):
            head(hidden).head()
        head.weight = nn.Parameter(torch.zeros(9, 4, device="meta"))
        with pytest.raises(TypeError, match="partitioned or offloaded"):
            head(hidden).head()
        head.weight = nn.Parameter(torch.zeros(9, 4))
        deferred = head(hidden)
        head.weight.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="was resharded"):
            deferred.head()


def test_model_that_never_calls_its_head_is_refused(impl):
    config = MobileBertConfig(vocab_size=VOCAB, num_hidden_layers=1, pad_token_id=0)
    model = patch(MobileBertForMaskedLM(config), impl=impl)
    message = "expected MobileBertForMaskedLM to compute its logits by calling its head, a Linear"
    with pytest.raises(DeferredLogitsError, match=message):
        model(**batch())
    assert model(batch()["input_ids"]).logits is not None
    assert unpatch(model)(**batch()).loss > 0


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_classifiers_are_refused_when_patched(kind):
    cls = getattr(transformers, f"Gemma2For{kind}")
    forward = cls.forward
    for target in (cls(cls.config_class(**BASE)), cls, cls.__name__):
        with pytest.raises(TypeError, match=f"expected Gemma2For{kind} to have output embeddings"):
            patch(target)
    assert cls.forward is forward
    with pytest.raises(TypeError, match="BertForSequenceClassification to have output embeddings"):
        patch(BertForSequenceClassification)


@pytest.mark.parametrize(
    "name",
    ["BertForMaskedLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "GPTNeoXForCausalLM"],
)
def test_classes_with_a_head_of_any_name_are_accepted(name):
    cls = getattr(transformers, name)
    assert patch(cls) is cls
    unpatch(cls)


def test_model_that_lost_its_head_is_refused(impl):
    model = patch(gemma2(), impl=impl)
    model.get_output_embeddings = lambda: None
    with pytest.raises(TypeError, match="to have output embeddings, got None"):
        model(**batch())
