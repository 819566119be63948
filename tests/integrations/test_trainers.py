"""Whole training loops of other people: same losses and gradients step by step as without us."""

from __future__ import annotations

import inspect
import types
import warnings

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
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from gemma_ext.integrations import trl as trl_patch
from gemma_ext.integrations.transformers import patch
from gemma_ext.nn._deferred_logits import DeferredLogits

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


def evaluation(model, tmp_path, trainer=Trainer, **options):
    arguments = TrainingArguments(tmp_path, **ARGUMENTS)
    return trainer(model, arguments, eval_dataset=examples(), **options)


def accuracy(prediction):
    right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"accuracy": float(right.mean())}


class OwnStep(Trainer):
    """As subclasses do, without `super`."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            output = model(**inputs)
        if prediction_loss_only:
            return output.loss, None, None
        return output.loss, output.logits, inputs["labels"]


@pytest.mark.parametrize("trainer", [Trainer, OwnStep])
@pytest.mark.parametrize("train_only", [None, True])
def test_logits_are_kept_where_a_trainer_collects_them(trainer, train_only, impl, tmp_path):
    model = gemma2()
    patched = patch(clone(model), impl=impl, train_only=train_only)
    eager, ours = (
        evaluation(model, tmp_path, trainer, compute_metrics=accuracy) for model in (model, patched)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*train_only")
        expected, got = eager.evaluate(), ours.evaluate()
        for name in ("eval_loss", "eval_accuracy"):
            assert got[name] == pytest.approx(expected[name], rel=1e-5)
        predictions = ours.predict(examples()).predictions
    assert predictions == pytest.approx(eager.predict(examples()).predictions, rel=1e-5, abs=1e-5)


def test_trainer_that_wants_the_loss_alone_holds_no_logits(impl, tmp_path):
    model = gemma2()
    shapes = []
    patched = patch(clone(model), impl=impl)
    patched.lm_head.register_forward_hook(lambda head, args, logits: shapes.append(type(logits)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*train_only")
        got = evaluation(patched, tmp_path).evaluate()
    expected = evaluation(model, tmp_path).evaluate()
    assert got["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert set(shapes) == {DeferredLogits}


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


def with_fused_head(model, **options):
    """What `trl_patch` sees of a trainer, with a head that trl has just fused."""
    add_fused_lm_head(model, **options)
    return types.SimpleNamespace(model=model)


def score(trainer, autocast: bool):
    """Log-probabilities, entropies and the gradients of their sum."""
    model = trainer.model
    inputs = dict(zip(("input_ids", "labels"), torch.randint(3, VOCAB, (2, 2, 11)), strict=True))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**inputs, fused_lm_head=True)
    total = output.log_probs.sum() + output.entropy.sum()
    total.backward()
    values = torch.stack([output.log_probs, output.entropy]).detach()
    return values, (total.detach(), {n: p.grad.clone() for n, p in model.named_parameters()})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
def test_trl_float32_head(tied, dtype, autocast, impl):
    """The head in float32 below a backbone in bfloat16, under autocast or of its own."""
    options = {
        "cast_lm_head_to_fp32": True,
        "temperature": 0.7,
        "outputs": ("log_probs", "entropy"),
    }
    model = gemma2(tie_word_embeddings=tied).to(dtype)

    def scored(ours, **changes):
        trainer = with_fused_head(clone(model), **{**options, **changes})
        torch.manual_seed(2)
        return score(trl_patch.patch(trainer, impl=impl) if ours else trainer, autocast)

    (expected, gradients), (got, ours) = scored(False), scored(True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # the weight's gradient comes back in bfloat16
    assert_same_training(ours, gradients, tolerance=1e-4 if dtype == torch.float32 else 2e-2)
    if autocast and dtype == torch.float32:
        rounded = scored(True, cast_lm_head_to_fp32=False)[0]
        assert (rounded - expected).abs().max() > 1e-2


@pytest.mark.parametrize("cast", [True, False])
def test_grpo_hands_its_options_to_the_patch(cast, impl, tmp_path):
    arguments = GRPOConfig(
        tmp_path,
        bf16=True,
        gradient_checkpointing=False,
        cast_lm_head_to_fp32=cast,
        temperature=0.7,
        num_generations=2,
        **{**ARGUMENTS, "gradient_accumulation_steps": 1},
    )
    trainer = GRPOTrainer(
        gemma2(tie_word_embeddings=False),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "w5 w9"}] * 4),
        processing_class=tokenizer(),
    )
    torch.manual_seed(2)
    expected, _ = score(trainer, autocast=True)
    trl_patch.patch(trainer, impl=impl)
    settings = vars(trainer.model)[trl_patch._PATCH][-1]
    assert (settings.float32, settings.temperature) == (cast, 0.7)
    assert settings.fields == ("log_probs", "entropy")
    torch.manual_seed(2)
    torch.testing.assert_close(
        score(trainer, autocast=True)[0], expected, rtol=0, atol=1e-3 if cast else 0.3
    )


def test_the_installed_trl_has_the_names_we_read():
    options = inspect.signature(add_fused_lm_head).parameters
    assert set(options) == {"model", "temperature", "cast_lm_head_to_fp32", "outputs"}
    trainer = with_fused_head(gemma2())
    closed = inspect.getclosurevars(trainer.model.forward.__func__).nonlocals
    assert set(trl_patch._CLOSURE) <= set(closed)


def test_trl_whose_names_moved_is_refused(impl):
    model = gemma2()

    def install(original_forward, temperature, fp32_lm_head, outputs):
        def forward(self, *args, fused_lm_head=False, **kwargs):
            return original_forward, temperature, fp32_lm_head, outputs

        model.forward = types.MethodType(forward, model)

    install(model.forward, 1.0, True, ("log_probs",))
    with pytest.raises(TypeError, match="got one without cast_lm_head_to_fp32"):
        trl_patch.patch(types.SimpleNamespace(model=model), impl=impl)


def test_trl_patch_survives_what_a_trainer_does(impl):
    trainer = with_fused_head(gemma2(), outputs=("log_probs", "entropy"))
    torch.manual_seed(2)
    expected = score(trainer, autocast=False)[0]
    theirs = trainer.model.forward
    trl_patch.patch(trainer, impl="reference")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.prepare(trainer.model)
    trl_patch.patch(trainer, impl=impl)
    assert accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False) is trainer.model
    torch.manual_seed(2)
    torch.testing.assert_close(score(trainer, autocast=False)[0], expected)
    assert trl_patch.unpatch(trainer).model.forward == theirs
    with pytest.warns(FutureWarning, match="state is ignored"):
        trl_patch.patch(trainer, impl=impl, state=False)


def test_a_second_trainer_of_the_same_model(impl):
    model = gemma2()
    first = trl_patch.patch(with_fused_head(model), impl=impl)
    second = with_fused_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    torch.manual_seed(2)
    expected = score(second, autocast=False)[0]
    theirs = model.forward
    trl_patch.patch(second, impl=impl)
    assert model.forward != theirs
    torch.manual_seed(2)
    torch.testing.assert_close(score(second, autocast=False)[0], expected)
    ids = torch.arange(9)[None]
    assert model(ids).logits.shape == (1, 9, VOCAB)
    assert trl_patch.unpatch(second).model.forward == theirs
    assert model(ids).logits.shape == (1, 9, VOCAB)
    assert first.model is model


def test_a_copy_scores_with_its_own_weights(impl):
    trainer = with_fused_head(gemma2(), outputs=("log_probs", "entropy"))
    twin = clone(trl_patch.patch(trainer, impl=impl).model)
    with torch.no_grad():
        twin.model.norm.weight.mul_(0.1)
    expected = with_fused_head(gemma2(), outputs=("log_probs", "entropy"))
    with torch.no_grad():
        expected.model.model.norm.weight.mul_(0.1)
    scores = []
    for trainer in (types.SimpleNamespace(model=twin), expected):
        torch.manual_seed(2)
        scores.append(score(trainer, autocast=False)[0])
    torch.testing.assert_close(*scores)


def test_trl_unpatched_below_a_wrapper(impl):
    trainer = trl_patch.patch(with_fused_head(gemma2()), impl=impl)
    inner = trainer.model.forward
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(kwargs)
        return inner(*args, **kwargs)

    trainer.model.forward = wrapper
    inputs = dict.fromkeys(("input_ids", "labels"), torch.arange(9)[None])
    ours = trainer.model(**inputs, fused_lm_head=True)
    trl_patch.unpatch(trainer)
    theirs = trainer.model(**inputs, fused_lm_head=True)
    assert len(calls) == 2
    torch.testing.assert_close(ours.log_probs, theirs.log_probs)


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
