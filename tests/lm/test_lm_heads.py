"""What is held while a model is scored, and which heads are refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from lm_models import causal, tokenizer
from test_causal import lm_of, words
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemma_ext.lm import HuggingFaceModel
from gemma_ext.nn._deferred_logits import DeferredLogitsError

VOCAB = len(tokenizer())


class Widest(TorchDispatchMode):
    """The most rows of any floating tensor with a column for every token of the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                wide = tensor.dim() > 0 and tensor.shape[-1] == VOCAB
                self.rows = max(self.rows, wide * tensor.numel() // VOCAB)
        return made


def test_no_logits_are_held():
    model = causal(sliding_window=8, final_logit_softcapping=3.0)
    lm = lm_of(model)
    with Widest() as held:
        lm.choices(words(1, 5, 40), ["abc", " bl", "x"])
        lm.logprobs(words(2, 5, 40), words(3, 5, 9))
        lm.perplexity(words(4, 3, 90))
    assert held.rows == 0
    with Widest() as held, torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert held.rows >= 3


class Distance(nn.Module):
    """A head whose logits are no product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCAB, 32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(hidden, self.weight)


def test_a_head_that_is_no_product_is_refused():
    model = causal("Llama", tie_word_embeddings=False)
    model.lm_head = Distance()
    refused = r"to be a product by F\.linear, got Distance.*; it cannot be scored without holding"
    with pytest.raises(TypeError, match=refused):
        lm_of(model).logprobs(["a"], ["b"])


def test_logits_with_another_treatment_are_refused():
    class Squared(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits**2
            return output

    model = Squared(causal("Llama").config)
    with pytest.raises(DeferredLogitsError, match="a power to its logits, which has no fused form"):
        lm_of(model).logprobs(["a"], ["b"])


def test_a_model_without_a_head_is_refused():
    with pytest.raises(TypeError, match="expected LlamaModel to have output embeddings, got None"):
        HuggingFaceModel(causal("Llama").model, tokenizer())


def test_a_tuned_prompt_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(causal("Llama"), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(TypeError, match="logits for 2 inputs, got 5; a model with a tuned prompt"):
        lm_of(model).logprobs(["a"], ["x"])


@pytest.mark.parametrize("name", ["max_length", "batch_tokens"])
def test_sizes_are_checked(name):
    with pytest.raises(ValueError, match=f"expected {name} to be at least 1, got 0"):
        lm_of(causal("Llama"), **{name: 0})


def test_the_window_is_the_models_else_the_tokenizers():
    assert lm_of(causal("Llama")).max_length == 96
    model, text = causal("Llama"), tokenizer()
    model.config.max_position_embeddings = 0  # not told
    assert HuggingFaceModel(model, text).max_length == 2048
    text.model_max_length = 50
    assert HuggingFaceModel(model, text).max_length == 50
    assert lm_of(model, max_length=7).max_length == 7


def test_a_folder_is_loaded(tmp_path):
    model = causal("Llama")
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    lm = HuggingFaceModel.load(tmp_path, device="cpu", show_progress=False)
    assert lm.model.dtype == torch.float32
    assert lm.logprobs(["abc"], ["xyz"]) == lm_of(model).logprobs(["abc"], ["xyz"])
    rounded = HuggingFaceModel.load(tmp_path, dtype=torch.bfloat16, show_progress=False)
    assert rounded.model.dtype == torch.bfloat16
    with pytest.raises(OSError, match="none"):
        HuggingFaceModel.load(tmp_path / "none")


def test_what_is_no_model_is_named():
    with pytest.raises(TypeError, match="expected a model of transformers, got NoneType"):
        HuggingFaceModel(None, None)
