"""Whole training loops of other people: same losses and gradients step by step as without us."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from tiny_models import VOCAB, assert_same_training, build, clone, gemma2
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from gemma_ext.integrations import trl as trl_patch
from gemma_ext.integrations.transformers import patch

STEPS = 3
ARGUMENTS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "max_steps": STEPS,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "seed": 0,
}


def examples(count: int = 16, length: int = 11) -> list[dict[str, list[int]]]:
    """Sequences with a masked prompt of varying length, so that micro-batches differ in count."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (count, length), generator=generator)
    labels = ids.clone()
    for row in range(count):
        labels[row, : row % 8] = -100
    masks = torch.ones_like(ids)
    rows = zip(ids.tolist(), labels.tolist(), masks.tolist(), strict=True)
    return [{"input_ids": i, "labels": label, "attention_mask": m} for i, label, m in rows]


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<pad>": VOCAB - 1}
    words = Tokenizer(models.WordLevel(words, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="w2",
    )


class Recorder(TrainerCallback):
    """Losses of all steps and the gradients of the first."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logs: list[dict[str, float]] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            named = model.named_parameters()
            self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.logs.append(logs)


def run(trainer) -> Recorder:
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert len(recorder.losses) == STEPS
    return recorder


def assert_same_run(got: Recorder, expected: Recorder, tolerance: float = 1e-5) -> None:
    assert got.losses == pytest.approx(expected.losses, rel=tolerance, abs=1e-4)
    assert_same_training(
        (torch.tensor(got.losses[0]), got.gradients),
        (torch.tensor(expected.losses[0]), expected.gradients),
        max(tolerance, 1e-5),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"average_tokens_across_devices": False, "gradient_accumulation_steps": 1},
        {"bf16": True},
    ],
    ids=["fp32", "checkpointing", "no accumulation", "bf16"],
)
def test_trainer(options, impl, tmp_path):
    model = gemma2()

    def training(model):
        arguments = TrainingArguments(tmp_path, **{**ARGUMENTS, **options})
        return Trainer(
            model, arguments, train_dataset=examples(), data_collator=default_data_collator
        )

    expected = run(training(clone(model)))
    got = run(training(patch(model, impl=impl)))
    assert_same_run(got, expected, tolerance=3e-2 if options.get("bf16") else 1e-5)


def test_trainer_evaluates(impl, tmp_path):
    model = gemma2()

    def evaluate(model, **options):
        arguments = TrainingArguments(tmp_path, **ARGUMENTS)
        return Trainer(model, arguments, eval_dataset=examples(), **options).evaluate()

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) >= 0).mean())}

    eager = evaluate(clone(model))
    assert evaluate(patch(clone(model), impl=impl))["eval_loss"] == pytest.approx(
        eager["eval_loss"], rel=1e-5
    )
    patched = patch(model, impl=impl, train_only=True)
    assert evaluate(patched, compute_metrics=accuracy)["eval_accuracy"] == 1.0


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("patched_first", [True, False], ids=["patch-prepare", "prepare-patch"])
def test_accelerate(precision, patched_first, impl):
    model = gemma2()

    def first_step(model, patched):
        set_seed(0)
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        if patched and patched_first:
            patch(model, impl=impl)
        loader = torch.utils.data.DataLoader(
            examples(), batch_size=4, collate_fn=default_data_collator
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if patched and not patched_first:
            patch(model, impl=impl)
        output = model(**next(iter(loader)))
        assert (output.get("logits") is None) == patched
        accelerator.backward(output.loss)
        return output.loss.detach(), {n: p.grad for n, p in model.named_parameters()}

    expected = first_step(clone(model), patched=False)
    got = first_step(model, patched=True)
    assert_same_training(got, expected, tolerance=1e-5 if precision == "no" else 3e-2)


def supervised(model, tmp_path, rows=None, **options):
    arguments = SFTConfig(
        tmp_path,
        bf16=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        **ARGUMENTS,
    )
    return SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(examples() if rows is None else rows),
        processing_class=tokenizer(),
        data_collator=default_data_collator,
        **options,
    )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sft_trainer(lora, impl, tmp_path):
    model = gemma2()
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None

    def trainer():
        torch.manual_seed(7)
        return supervised(clone(model), tmp_path, peft_config=adapter)

    expected = run(trainer())
    got = run(trl_patch.patch(trainer(), impl=impl))
    assert_same_run(got, expected)
    for ours, theirs in zip(got.logs, expected.logs, strict=True):
        for name in ("entropy", "mean_token_accuracy", "num_tokens"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-4, abs=1e-4)


def test_sft_trainer_keeps_the_router_loss(impl, tmp_path):
    model = build("Mixtral", num_local_experts=4, router_aux_loss_coef=0.5)
    expected = run(supervised(clone(model), tmp_path))
    got = run(trl_patch.patch(supervised(model, tmp_path), impl=impl))
    assert_same_run(got, expected)
    assert float(got.logs[0]["aux_loss"]) == pytest.approx(float(expected.logs[0]["aux_loss"]))


def test_sft_trainer_trains_an_adapter_on_the_head(impl, tmp_path):
    adapter = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    trainer = supervised(gemma2(tie_word_embeddings=False), tmp_path)
    trl_patch.patch(trainer, impl=impl)
    inject_adapter_in_model(adapter, trainer.model)
    assert any("lora_B" in name for name in run(trainer).gradients)


def test_dpo_trainer(impl, tmp_path):
    model = gemma2()
    pairs = [
        {"prompt": f"w{5 + i} w9", "chosen": f"w{20 + i} w7", "rejected": f"w{40 + i} w8 w{i + 3}"}
        for i in range(8)
    ]

    def trainer():
        arguments = DPOConfig(tmp_path, bf16=False, gradient_checkpointing=False, **ARGUMENTS)
        return DPOTrainer(
            clone(model),
            ref_model=gemma2(seed=1),
            args=arguments,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer(),
        )

    expected = run(trainer())
    got = run(trl_patch.patch(trainer(), impl=impl))
    assert_same_run(got, expected)
    for name in ("logits/chosen", "rewards/margins", "logps/chosen", "mean_token_accuracy"):
        ours, theirs = float(got.logs[-1][name]), float(expected.logs[-1][name])
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_trl_patch_can_be_undone(impl, tmp_path):
    trainer = supervised(gemma2(), tmp_path)
    theirs = trainer.model.forward
    assert trl_patch.patch(trainer, impl=impl) is trainer
    assert trainer.model.forward != theirs
    trl_patch.patch(trainer, impl=impl)
    assert trl_patch.unpatch(trainer).model.forward == theirs


def test_wrong_patch_for_the_trainer_is_refused(impl, tmp_path):
    with pytest.raises(ValueError, match=r"integrations\.trl\.patch\(trainer\)"):
        patch(supervised(gemma2(), tmp_path).model)
    arguments = TrainingArguments(tmp_path, **ARGUMENTS)
    with pytest.raises(TypeError, match="expected a trainer of trl"):
        trl_patch.patch(Trainer(gemma2(), arguments))
    with pytest.raises(ValueError, match="expected impl to be one of"):
        trl_patch.patch(supervised(gemma2(), tmp_path), impl="fast")
