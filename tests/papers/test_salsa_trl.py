"""References under the trainers of TRL."""

from __future__ import annotations

import copy
import types

import pytest
import tiny_gemma
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from salsa_toy import near
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from gemma_ext.nn.ppo import AdapterOffReference, FrozenReference
from gemma_ext.papers import salsa
from gemma_ext.ppo.opening import load_causal

TEXTS = ["the quick brown fox jumps over the lazy dog. a cat sat on the mat, the end. " * 8] * 4
ARGUMENTS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "max_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": 0,
}
PAIRS = [
    {"prompt": "the quick", "chosen": " brown fox", "rejected": " lazy"},
    {"prompt": "a cat", "chosen": " sat on", "rejected": " jumps over the"},
] * 4


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_gemma.base(tmp_path_factory.mktemp("model"), TEXTS)


def opened(folder):
    return load_causal(str(folder), "float32", "cpu")


def dpo(folder, out, ref_model, **changes):
    policy, tokenizer = opened(folder)
    return DPOTrainer(
        policy,
        ref_model=ref_model,
        args=DPOConfig(out, **{**ARGUMENTS, **changes}),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )


def online(kind, folder, out, **changes):
    policy, tokenizer = opened(folder)
    trainer, settings = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    options = {"beta": 0.1, "num_generations": 2, "max_completion_length": 5, "temperature": 0.8}
    return trainer(
        policy,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=settings(out, **{**ARGUMENTS, **options, **changes}),
        train_dataset=Dataset.from_list([{"prompt": p["prompt"]} for p in PAIRS]),
        processing_class=tokenizer,
    )


def losses(trainer):
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def ref_logps(trainer, ids):
    found, *_ = trainer._get_per_token_logps_and_entropies(
        trainer.ref_model, ids, torch.ones_like(ids), 4
    )
    return found


@torch.no_grad()
def logps64(of, ids, temperature):
    z = (of(input_ids=ids).logits.double() / temperature).log_softmax(-1)[:, :-1]
    return z.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)[:, -4:]


def test_dpo_takes_a_soup_either_way(folder, tmp_path):
    first = opened(folder)[0]
    reference = salsa.SoupReference([first, near(first, 1)])
    given = losses(dpo(folder, tmp_path / "1", copy.deepcopy(reference.model)))
    put = dpo(folder, tmp_path / "2", copy.deepcopy(first))
    assert salsa.trl.use_reference(put, reference) is put
    assert losses(put) == given
    assert losses(dpo(folder, tmp_path / "3", copy.deepcopy(first))) != given


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_online_trainers_are_held_near_the_soup(kind, folder, tmp_path):
    first = opened(folder)[0]
    parents = [first, near(first, 1, by=0.1)]
    trainer = online(kind, folder, tmp_path)
    salsa.trl.use_reference(trainer, salsa.SoupReference(parents))
    ids = torch.randint(5, 280, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = logps64(salsa.soup(parents), ids, 0.8)
    assert (ref_logps(trainer, ids).double() - expected).abs().max() < 1e-4
    before = salsa.digest(trainer.ref_model)
    assert len(losses(trainer)) == 2
    # the policy starts beside the soup; beside itself it would be 0 to rounding
    assert abs(trainer.state.log_history[0]["kl"]) > 1e-3
    assert salsa.digest(trainer.ref_model) == before


def test_several_models_under_grpo(folder, tmp_path):
    first = opened(folder)[0]
    parents = [copy.deepcopy(first), near(first, 1, by=0.1)]
    trainer = online("grpo", folder, tmp_path)
    reference = salsa.MultiReference(copy.deepcopy(parents), [0.3, 0.7])
    salsa.trl.use_reference(trainer, reference)
    ids = torch.randint(5, 280, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = 0.3 * logps64(parents[0], ids, 0.8) + 0.7 * logps64(parents[1], ids, 0.8)
    assert (ref_logps(trainer, ids).double() - expected).abs().max() < 1e-4
    assert len(losses(trainer)) == 2


def test_several_models_under_dpo(folder, tmp_path):
    first = opened(folder)[0]
    alone = losses(dpo(folder, tmp_path / "1", copy.deepcopy(first)))
    twice = dpo(folder, tmp_path / "2", near(first, 5))
    salsa.trl.use_reference(
        twice, salsa.MultiReference([copy.deepcopy(first), copy.deepcopy(first)])
    )
    assert losses(twice) == pytest.approx(alone, abs=1e-6)


def test_a_moving_reference_moves_is_saved_and_resumed(folder, tmp_path):
    first = opened(folder)[0]

    def run(out, steps, resume=False):
        trainer = dpo(
            folder, out, copy.deepcopy(first), max_steps=steps, save_strategy="steps", save_steps=1,
            lr_scheduler_type="constant",
        )  # fmt: skip
        reference = salsa.ema(copy.deepcopy(first), 0.5, seed=3)
        salsa.trl.use_reference(trainer, reference)
        trainer.train(resume_from_checkpoint=resume)
        return reference

    whole = run(tmp_path / "whole", 3)
    assert whole.moves == 3
    assert salsa.digest(whole.model) != salsa.digest(first)
    run(tmp_path / "broken", 2)
    assert (tmp_path / "broken" / "checkpoint-2" / "reference.pt").exists()
    resumed = run(tmp_path / "broken", 3, resume=True)
    assert resumed.moves == 3
    assert salsa.digest(resumed.model) == salsa.digest(whole.model)


def test_a_sync_is_trls(folder, tmp_path):
    first = opened(folder)[0]
    theirs = dpo(
        folder, tmp_path / "1", copy.deepcopy(first), sync_ref_model=True,
        ref_model_mixup_alpha=0.6, ref_model_sync_steps=1,
    )  # fmt: skip
    ours = dpo(folder, tmp_path / "2", copy.deepcopy(first))
    salsa.trl.use_reference(ours, salsa.sync(copy.deepcopy(first), 0.6, every=1))
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    pairs = zip(ours.ref_model.parameters(), theirs.ref_model.parameters(), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_trainers_that_cannot_are_refused(folder, tmp_path):
    first = opened(folder)[0]
    frozen = FrozenReference(first)
    with pytest.raises(TypeError, match="expected a trainer with a ref_model"):
        salsa.trl.use_reference(types.SimpleNamespace(), frozen)
    with pytest.raises(ValueError, match="expected beta above 0"):
        salsa.trl.use_reference(online("grpo", folder, tmp_path, beta=0.0), frozen)
    trainer = dpo(folder, tmp_path, copy.deepcopy(first))
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="without DeepSpeed and FSDP"):
        salsa.trl.use_reference(trainer, frozen)
    trainer.is_fsdp_enabled = False
    trainer.precompute_ref_logps = True
    with pytest.raises(ValueError, match="precompute_ref_log_probs=False"):
        salsa.trl.use_reference(trainer, salsa.ema(first, 0.9))
    trainer.precompute_ref_logps = False
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(copy.deepcopy(first), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="expected a reference with a model, got AdapterOff"):
        salsa.trl.use_reference(trainer, AdapterOffReference(policy))
