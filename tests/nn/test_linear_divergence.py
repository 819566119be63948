"""Distillation between models of transformers, without the logits of either."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from gemma_ext.integrations.transformers import patch
from gemma_ext.nn import distillation_loss
from gemma_ext.reference.cce_divergence import divergence

VOCAB = 101
SHAPE = {
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
KINDS = ("forward_kl", "reverse_kl", "jsd", "tvd")


def gemma2(width: int = 32, seed: int = 0, vocab: int = VOCAB) -> nn.Module:
    """Logits reach well past the cap."""
    torch.manual_seed(seed)
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=vocab, hidden_size=width, **SHAPE)).eval()
    nn.init.constant_(model.model.norm.weight, 100.0)
    return model


def llama(width: int = 24, vocab: int = VOCAB) -> nn.Module:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=width, **SHAPE)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config).eval()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :4] = labels[1, -2:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def materialised(student, teacher, inputs, kind="forward_kl", temperature=1.0):
    """Mean divergence over the labels that count, from both models' logits."""
    ids = {name: value for name, value in inputs.items() if name != "labels"}
    s, t = (model(**ids).logits[:, :-1].float() / temperature for model in (student, teacher))
    counts = inputs["labels"][:, 1:] != -100
    return divergence(s[counts], t[counts], kind).mean()


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(found, wanted):
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        torch.testing.assert_close(
            found[name], want, rtol=2e-3, atol=1e-5 * float(want.abs().max())
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gemma2_from_llama(kind):
    student, teacher, inputs = gemma2(), llama(), batch()
    loss = distillation_loss(student, teacher, inputs, kind=kind, temperature=2.0)
    want = materialised(student, teacher, inputs, kind, 2.0)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    check(gradients(loss, student), gradients(want, student))
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("student", [llama, gpt2], ids=["llama", "gpt2"])
def test_other_families(student):
    student, teacher, inputs = student(), gemma2(), batch()
    out = distillation_loss(student, teacher, inputs, ce_weight=0.5, return_parts=True)
    want = materialised(student, teacher, inputs)
    torch.testing.assert_close(out.divergence, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.cross_entropy, student(**inputs).loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, out.divergence + 0.5 * out.cross_entropy)


class NoLogits(TorchDispatchMode):
    """Refuses results with a column per word."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            wide = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 1
            assert not (wide and x.shape[-1] == VOCAB), f"{func} makes {list(x.shape)}"
        return out


def test_no_logits_are_made():
    """Of either model, forward or backward."""
    student, teacher, inputs = gemma2(), llama(), batch()
    with NoLogits():
        distillation_loss(student, teacher, inputs).backward()
    with pytest.raises(AssertionError, match="makes"), NoLogits():
        student(**inputs)


def test_a_patched_student_and_a_teacher_that_is_the_student():
    student = gemma2()
    twin = gemma2()
    assert distillation_loss(patch(student), twin, batch()).item() == 0.0


class Wrapper(nn.Module):
    """What (Distributed)DataParallel is to a caller."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_wrapped_models():
    student, teacher, inputs = gemma2(), llama(), batch()
    want = distillation_loss(student, teacher, inputs)
    assert torch.equal(distillation_loss(Wrapper(student), Wrapper(teacher), inputs), want)


def test_bfloat16_under_autocast():
    student, teacher, inputs = gemma2(), llama().bfloat16(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(student, teacher, inputs)
    loss.backward()
    want = materialised(student, teacher.float(), inputs)
    torch.testing.assert_close(loss, want, rtol=0.05, atol=0.05)
    assert student.lm_head.weight.grad.dtype == torch.float32


def test_heads_padded_differently():
    student, teacher, inputs = gemma2(), llama(vocab=VOCAB + 7), batch()
    with pytest.raises(ValueError, match=f"expected teacher_c to have the {VOCAB} rows of c"):
        distillation_loss(student, teacher, inputs)
    loss = distillation_loss(student, teacher, inputs, vocab_size=VOCAB)
    ids = {k: v for k, v in inputs.items() if k != "labels"}
    counts = inputs["labels"][:, 1:] != -100
    s = student(**ids).logits[:, :-1][counts]
    t = teacher(**ids).logits[:, :-1, :VOCAB][counts]
    torch.testing.assert_close(loss, divergence(s, t, "forward_kl").mean(), rtol=1e-5, atol=1e-6)


def test_refusals():
    student, teacher, inputs = gemma2(), llama(), batch()
    with pytest.raises(ValueError, match="expected labels in the batch, got none"):
        distillation_loss(student, teacher, {"input_ids": inputs["input_ids"]})
    with pytest.raises(TypeError, match="expected Gemma2Model to have output embeddings"):
        distillation_loss(student.model, teacher, inputs)

    class Silent(Gemma2ForCausalLM):
        def forward(self, *args, **kwargs):
            self.lm_head(self.model(input_ids=kwargs["input_ids"]).last_hidden_state)
            return {}

    silent = Silent(student.config).eval()
    with pytest.raises(TypeError, match="expected Silent to return the logits of its head"):
        distillation_loss(silent, teacher, inputs)


def test_a_trainer_that_distils(tmp_path):
    """One line in `compute_loss`; the student comes nearer to its teacher."""
    student, teacher = gemma2(16, seed=3), gemma2(32, seed=4)
    nn.init.constant_(teacher.model.norm.weight, 3.0)
    nn.init.constant_(student.model.norm.weight, 1.0)

    class DistillationTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return distillation_loss(model, teacher, inputs, kind="jsd")

    rows = [{name: value[0] for name, value in batch(seed).items()} for seed in range(16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    before = float(distillation_loss(student.eval(), teacher, inputs, kind="jsd"))
    DistillationTrainer(student, arguments, train_dataset=rows).train()
    after = float(distillation_loss(student.eval(), teacher, inputs, kind="jsd"))
    assert after < 0.8 * before


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_divergence_of_trl(beta):
    """Its generalised JSD of materialised logits, over the labels that count."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher, inputs = gemma2(), llama(), batch()
    found = distillation_loss(student, teacher, inputs, kind="jsd", beta=beta, temperature=1.5)
    ids = {name: value for name, value in inputs.items() if name != "labels"}
    s, t = (model(**ids).logits[:, :-1] for model in (student, teacher))
    labels = inputs["labels"][:, 1:]
    want = gkd.GKDTrainer.generalized_jsd_loss(s, t, labels, beta=beta, temperature=1.5)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_no_cache_is_built():
    student, teacher = gemma2().train(), gemma2(seed=3)
    seen = []
    for model in (student, teacher):
        model.model.register_forward_hook(lambda m, a, o: seen.append(o.past_key_values))
    distillation_loss(student, teacher, batch())
    assert seen == [None, None]
