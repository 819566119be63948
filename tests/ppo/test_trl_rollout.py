"""trl's GRPO with responses by the engine."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from ppo_tiny import END, PROMPTS, tiny_model, tokenizer

from gemma_ext.nn.ppo import FrozenReference, Sequences
from gemma_ext.ppo.trl_rollout import EngineRollout

trl = pytest.importorskip("trl")


def trained(folder, rollout, reward, **options):
    arguments = trl.GRPOConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "max_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 6,
            "temperature": 0.8,
            "learning_rate": 1e-2,
            "seed": 0,
            **options,
        }
    )
    trainer = trl.GRPOTrainer(
        tiny_model(),
        reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}),
        processing_class=tokenizer(),
        rollout_func=rollout,
    )
    trainer.train()
    return trainer


def test_grpo_by_the_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    engine, told, seen = EngineRollout(seed=3), [], []

    def rollout(prompts, trainer):
        found = engine(prompts, trainer)
        told.append((prompts, found, [p.detach().clone() for p in trainer.model.parameters()]))
        return found

    def reward(completion_ids, **columns):
        seen.append(completion_ids)
        return [float(sum(i % 2 for i in ids)) for ids in completion_ids]

    trainer = trained(tmp_path, rollout, reward)
    assert len(told) == 2
    assert [line["reward"] for line in trainer.state.log_history if "reward" in line]
    model = tiny_model()
    for (prompts, found, weights), completions in zip(told, seen, strict=True):
        assert found["completion_ids"] == completions
        assert len(prompts) == len(found["prompt_ids"]) == 4
        assert prompts[0] == prompts[1] != prompts[2]  # two answers to each
        assert found["completion_ids"][0] != found["completion_ids"][1]
        with torch.no_grad():
            for mine, kept in zip(model.parameters(), weights, strict=True):
                mine.copy_(kept)
        for prompt, ids, logprobs in zip(*found.values(), strict=True):
            assert ids.index(END) == len(ids) - 1 if END in ids else len(ids) == 6
            given = torch.tensor([prompt])
            made = Sequences.of_lengths(
                given, torch.ones_like(given), torch.tensor([ids]), torch.tensor([len(ids)])
            )
            expected = FrozenReference(model).logprobs(made, 0.8)
            torch.testing.assert_close(torch.tensor(logprobs), expected, atol=2e-5, rtol=0)
    assert any(not torch.equal(a, b) for a, b in zip(told[0][2], told[1][2], strict=True))


def test_draws_belong_to_step_and_place(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    class Trainer:
        model, processing_class = tiny_model(), tokenizer()
        args = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        state = type("State", (), {"global_step": 0})
        accelerator = type("Accelerator", (), {"process_index": 0})

    Trainer.args.max_completion_length = 6
    first, again = EngineRollout(), EngineRollout()
    one = first(PROMPTS, Trainer)["completion_ids"]
    assert first(PROMPTS, Trainer)["completion_ids"] != one  # the second call of a step
    Trainer.state.global_step = 1
    two = first(PROMPTS, Trainer)["completion_ids"]
    assert two != one
    assert again(PROMPTS, Trainer)["completion_ids"] == two  # a run that goes on at this step
    Trainer.accelerator.process_index = 1
    assert EngineRollout()(PROMPTS, Trainer)["completion_ids"] != two
    messages = [[{"role": "user", "content": "w3"}]]
    Trainer.processing_class.chat_template = "{{ messages[0]['content'] }} w5"
    assert again(messages, Trainer)["prompt_ids"] == [[3, 5]]


@pytest.mark.parametrize("setting", [{"min_p": 0.1}, {"repetition_penalty": 1.2}])
def test_what_the_engine_does_not_draw_by_is_refused(setting, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}: expected .* with rollouts by the engine, got"):
        trained(tmp_path, EngineRollout(), lambda completions, **more: [0.0] * 4, **setting)
