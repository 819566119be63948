"""Scripts for trl's removed PPO, with the import changed."""

from __future__ import annotations

import copy

import datasets
import pytest
import torch
import transformers
from toy_ppo import END, LIKED, PAD, VOCABULARY, Tokenizer, tiny

from gemma_ext.nn.ppo import AdapterOffReference, FrozenReference, SeparateCritic, Sequences
from gemma_ext.ppo.trl import (
    AutoModelForCausalLMWithValueHead,
    ClassifierReward,
    NamedAdapterReference,
    PPOConfig,
    PPOTrainer,
)


class Saved(Tokenizer):
    def save_pretrained(self, folder):
        (folder / "tokenizer.txt").write_text("numbers")


def classifier(seed: int = 1):
    torch.manual_seed(seed)
    config = tiny().config.to_dict() | {"num_labels": 1}
    return transformers.Gemma2ForSequenceClassification(transformers.Gemma2Config(**config)).eval()


def args(folder, **options) -> PPOConfig:
    return PPOConfig(
        **{
            "output_dir": str(folder),
            "total_episodes": 16,
            "per_device_train_batch_size": 4,
            "num_ppo_epochs": 2,
            "response_length": 5,
            "learning_rate": 1e-3,
            "num_sample_generations": 0,
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        }
    )


def liked(completion_ids, **columns):
    return [float(ids.count(LIKED)) for ids in completion_ids]


TOKENISED = datasets.Dataset.from_dict(
    {
        "input_ids": [[0, 0, 5], [0, 6, 7], [8, 9, 10]],
        "attention_mask": [[0, 0, 1], [0, 1, 1], [1] * 3],
    }
)
TEXTS = datasets.Dataset.from_dict({"prompt": ["5", "6 7", "8 9 10"]})


@pytest.mark.parametrize("dataset", [TOKENISED, TEXTS], ids=["input_ids", "prompt"])
def test_the_script_of_old(dataset, tmp_path):
    policy, reward = tiny(), classifier()
    before = copy.deepcopy(policy.state_dict())
    told = []

    class Callback(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **more):
            told.append((state.global_step, logs["objective/kl"], more["model"] is policy))

    trainer = PPOTrainer(
        args=args(tmp_path, logging_steps=2),
        processing_class=Saved(),
        model=policy,
        ref_model=tiny(),
        reward_model=reward,
        value_model=classifier(2),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=transformers.DataCollatorWithPadding,
        callbacks=[Callback()],
    )
    assert isinstance(trainer.trainer.critic, SeparateCritic)
    assert [trainer.trainer.prompts.ids(row) for row in range(3)] == [[5], [6, 7], [8, 9, 10]]
    history = trainer.train()
    assert [line["step"] for line in history] == [2, 4]
    assert [step for step, *_ in told] == [2, 4]
    assert all(same for *_, same in told)
    assert trainer.state.episode == 16
    assert len(trainer.state.log_history) == 2
    assert any(not torch.equal(before[name], value) for name, value in policy.state_dict().items())
    trainer.save_model(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again.state_dict()["lm_head.weight"], policy.state_dict()["lm_head.weight"])
    rows = trainer.generate_completions()
    assert [row["prompt"] for row in rows] == ["5", "6 7", "8 9 10"]
    assert all(isinstance(row["score"], float) for row in rows)
    assert trainer.generate_completions(sampling=True) == rows
    assert len(trainer.trainer.prompts) == 3


def test_a_function_rewards_and_no_reference_is_a_copy(tmp_path):
    policy = tiny()
    given = args(tmp_path, logging_steps=1)
    trainer = PPOTrainer(given, Saved(), policy, None, [liked, classifier()], TEXTS)
    assert isinstance(trainer.trainer.reference, FrozenReference)
    line = next(iter(trainer.train()))
    assert {"rewards/liked", "rewards/Gemma2ForSequenceClassification"} <= line.keys()
    assert abs(line["objective/kl"]) < 1e-5
    start, reference = tiny().state_dict(), trainer.trainer.reference.model.state_dict()
    assert all(torch.equal(start[name], reference[name]) for name in start)


def test_a_reward_model_is_read_at_the_last_token():
    model = classifier()
    prompts = torch.tensor([[0, 5, 6], [7, 8, 9]])
    made = Sequences.of_lengths(
        prompts, (prompts != 0).long(), torch.tensor([[3, 4, 0], [3, END, 0]]),
        torch.tensor([2, 2]), pad=PAD,
    )  # fmt: skip
    found = ClassifierReward(model, 1).score_sequences(made)
    alone = [[5, 6, 3, 4], [7, 8, 9, 3, END]]
    for row, ids in enumerate(alone):
        expected = model(input_ids=torch.tensor([ids])).logits[0, 0]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    trainer = PPOTrainer(
        args(tmp_path / "a"), Saved(), tiny(), None, liked, TEXTS, peft_config=config
    )
    assert type(trainer.trainer.reference) is AdapterOffReference
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()

    policy = peft.get_peft_model(tiny(), config, adapter_name="mine")
    policy.add_adapter("theirs", config)
    named = PPOTrainer(
        args(tmp_path / "b", model_adapter_name="mine", ref_adapter_name="theirs"),
        Saved(), policy, None, liked, TEXTS,
    )  # fmt: skip
    reference = named.trainer.reference
    assert isinstance(reference, NamedAdapterReference)
    prompts = torch.tensor([[5, 6]])
    responses = torch.tensor([[3, 4]])
    made = Sequences.of_lengths(prompts, prompts > 0, responses, torch.tensor([2]))
    policy.set_adapter("theirs")
    expected = FrozenReference(copy.deepcopy(policy)).logprobs(made, 0.7)
    policy.set_adapter("mine")
    assert torch.equal(reference.logprobs(made, 0.7), expected)
    named.train()
    assert policy.active_adapter == "mine"
    assert torch.equal(reference.logprobs(made, 0.7), expected)


def test_a_model_with_a_value_head(tmp_path):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny())
    ids = torch.randint(2, VOCABULARY, (2, 4))
    logits, loss, values = model(input_ids=ids, labels=ids)
    assert (logits.shape, values.shape) == ((2, 4, VOCABULARY), (2, 4))
    assert loss.requires_grad
    assert not values.any()
    assert model.generate(input_ids=ids, max_new_tokens=2, pad_token_id=PAD).shape == (2, 6)
    trainer = PPOTrainer(args(tmp_path), Saved(), model, None, liked, TEXTS)
    assert trainer.trainer.critic.head is model.v_head.summary
    trainer.train()
    _, _, values = model(input_ids=ids)
    assert values.any()
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "model")
    assert {"v_head.summary.weight", "v_head.summary.bias"} <= again.state_dict().keys()
    for found, expected in zip(again(input_ids=ids), model(input_ids=ids), strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    fresh = AutoModelForCausalLMWithValueHead(plain)
    assert not fresh(input_ids=ids)[2].any()
    assert fresh.config is plain.config


def test_a_callback_may_stop_the_run_and_functions_are_told_too(tmp_path):
    told = []

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            control.should_training_stop = state.global_step == 2
            return control

        def on_save(self, args, state, control, **more):
            kept.append((state.global_step, (tmp_path / "checkpoint-2-0.pt").exists()))

    kept = []
    calls = [Stop(), lambda trainer, step, line: told.append((step, line["step"]))]
    trainer = PPOTrainer(args(tmp_path), Saved(), tiny(), None, liked, TEXTS, callbacks=calls)
    trainer.train()
    assert told == [(1, 1), (2, 2)]
    assert [line["step"] for line in trainer.state.log_history] == [2]
    assert kept == [(2, True)]


def test_a_reference_with_a_value_head_is_its_model(tmp_path):
    """As old scripts made them, by copying the policy."""
    policy, other = (AutoModelForCausalLMWithValueHead(tiny(seed)) for seed in (0, 1))
    trainer = PPOTrainer(args(tmp_path), Saved(), policy, other, liked, TEXTS)
    assert trainer.trainer.reference.model is other.pretrained_model
    assert trainer.trainer.train_step()["objective/kl_k3"] > 0


def test_settings():
    settings = PPOConfig(num_train_epochs=2, kl_estimator="k3", stop_token="eos").settings(30)
    assert settings.total_episodes == 60
    assert (settings.kl_estimator, settings.stop_token) == ("k3", "eos")
    assert (settings.learning_rate, settings.temperature, settings.lam) == (3e-6, 0.7, 0.95)
    assert PPOConfig(num_train_epochs=0.001).settings(5).total_episodes == 1
    parser = transformers.HfArgumentParser(PPOConfig)
    (parsed,) = parser.parse_args_into_dataclasses(
        ["--output_dir", "x", "--kl_coef", "0.1", "--missing_eos_penalty", "1.0", "--bf16", "False"]
    )
    assert (parsed.kl_coef, parsed.missing_eos_penalty, parsed.bf16) == (0.1, 1.0, False)


def test_refusals(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match=r"optimizers: expected \(None, None\)"):
        PPOTrainer(args(tmp_path), Saved(), model, None, liked, TEXTS, optimizers=(1, None))
    with pytest.raises(ValueError, match="ref_model: expected another object than model"):
        PPOTrainer(args(tmp_path), Saved(), model, model, liked, TEXTS)
