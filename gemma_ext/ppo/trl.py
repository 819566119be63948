"""The PPO that trl had until 1.15, by its names: change the import, keep the script.

    from gemma_ext.ppo.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

What it was asked for most works too: `reward_model` may be a function, or several. It differs from
trl's where that was a defect or cannot be had here:

| trl                                                 | here                                       |
|-----------------------------------------------------|--------------------------------------------|
| whitens advantages of each rank by itself           | over the global batch                      |
| `max_grad_norm` is not looked at                    | clips the gradients                        |
| without `stop_token` responses have one length      | they end where the model ends a text       |
| `optimizers`                                        | AdamW of the settings; anything else fails |
| `bf16` and `gradient_checkpointing` unless set      | off                                        |
| score at, and a value of, the place behind the end  | score at the end, no value behind it       |
| reward model: `.score` on states of the token ids   | the same; a module without it gets texts   |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext import ppo
from gemma_ext.extras import require
from gemma_ext.nn._models import unwrap
from gemma_ext.nn.ppo import (
    AdapterOffReference,
    FrozenReference,
    Reference,
    Sequences,
    SharedCritic,
)
from gemma_ext.nn.ppo.adapters import active, peft_or_bare
from gemma_ext.nn.ppo.hidden import model_inputs
from gemma_ext.ppo.experience import chunks
from gemma_ext.ppo.files import save_model
from gemma_ext.ppo.ranks import rank
from gemma_ext.ppo.trl_model import AutoModelForCausalLMWithValueHead

__all__ = ["AutoModelForCausalLMWithValueHead", "PPOConfig", "PPOTrainer"]


@dataclass
class PPOConfig:
    """Settings under trl's names, for `transformers.HfArgumentParser` too.

    Those of `gemma_ext.ppo.PPOConfig` mean what they mean there. `total_episodes` is
    `num_train_epochs` passes over the prompts if None. `model_adapter_name` and `ref_adapter_name`
    are adapters of the policy. The names behind them are taken and not looked at.
    """

    output_dir: str = "out/ppo"
    num_train_epochs: float = 3.0
    total_episodes: int | None = None
    learning_rate: float = 3e-6
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_mini_batches: int = 1
    num_ppo_epochs: int = 4
    local_rollout_forward_batch_size: int = 64
    response_length: int = 53
    stop_token: str | None = None
    stop_token_id: int | None = None
    temperature: float = 0.7
    missing_eos_penalty: float | None = None
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    cliprange: float = 0.2
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 42
    logging_steps: int = 10
    save_steps: int = 500
    disable_tqdm: bool = False
    model_adapter_name: str | None = None
    ref_adapter_name: str | None = None

    exp_name: str = "ppo_config"
    run_name: str | None = None
    report_to: str | None = None
    reward_model_path: str = ""
    sft_model_path: str = ""
    dataset_num_proc: int | None = None
    num_sample_generations: int = 10
    eval_strategy: str = "no"
    eval_steps: float | None = None
    ds3_gather_for_generation: bool = True
    push_to_hub: bool = False

    def settings(self, prompts: int) -> ppo.PPOConfig:
        """Of `gemma_ext.ppo`, for so many prompts."""
        episodes = self.total_episodes
        if episodes is None:
            episodes = max(1, int(self.num_train_epochs * prompts))
        known = {f.name for f in dataclasses.fields(ppo.PPOConfig)}
        given = {k: v for k, v in dataclasses.asdict(self).items() if k in known}
        return ppo.PPOConfig(**{**given, "total_episodes": episodes})


class PPOTrainer:
    """trl's trainer over `gemma_ext.ppo.PPOTrainer`.

    Args:
        args: settings.
        processing_class: tokenizer of all models.
        model: the policy; one of `AutoModelForCausalLMWithValueHead` brings its critic.
        ref_model: the reference: a model, a `Reference`, or None for a copy of the policy, or for
            the policy without its adapter.
        reward_model: a sequence classification with one output, a function with trl's signature, a
            hub id or folder, or a list of them.
        train_dataset: rows of `input_ids` or of `prompt`.
        value_model: a sequence classification; None for a head on the policy's states.
        data_collator: not looked at: prompts are padded here.
        eval_dataset: prompts of `generate_completions`.
        optimizers: (None, None).
        callbacks: of transformers, or functions of (`gemma_ext.ppo` trainer, step, metrics).
        peft_config: puts the policy under an adapter.

    Attributes:
        trainer: of `gemma_ext.ppo`. model: the policy.
    """

    def __init__(
        self,
        args: PPOConfig,
        processing_class: Any,
        model: nn.Module,
        ref_model: nn.Module | Reference | None,
        reward_model: Any,
        train_dataset: Any,
        value_model: nn.Module | None = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: Sequence[Any] | None = None,
        peft_config: Any = None,
    ) -> None:
        if any(part is not None for part in optimizers):
            raise ValueError("optimizers: expected (None, None), the settings name AdamW, got one")
        if ref_model is model:
            raise ValueError("ref_model: expected another object than model, or None for a copy")
        self.args, self.processing_class = args, processing_class
        self.eval_dataset = None if eval_dataset is None else rows_of(eval_dataset)
        if isinstance(model, AutoModelForCausalLMWithValueHead):
            head = model.v_head.summary
            value_model = value_model or SharedCritic(head.weight.shape[1], head)
            model = model.pretrained_model
        if peft_config is not None:
            require("a policy under an adapter", "ppo", "peft")
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if args.model_adapter_name is not None:
            peft_or_bare(model).set_adapter(args.model_adapter_name)
        rows = rows_of(train_dataset)
        self.model, self.callbacks = model, list(callbacks or ())
        self.trainer = _Trainer(
            args.settings(len(rows)),
            model,
            _reference(model, ref_model, args.ref_adapter_name),
            [_reward(each, args) for each in _list(reward_model)],
            rows,
            value_model,
            processing_class,
            reward_tokenizers=processing_class,
            callbacks=[self._behind_step],
            show_progress=not args.disable_tqdm,
        )
        self.trainer.saved = lambda: self._tell("on_save")
        self.state = SimpleNamespace(
            global_step=0,
            episode=0,
            max_steps=self.trainer.steps,
            log_history=[],
            is_world_process_zero=rank() == 0,
            is_local_process_zero=rank() == 0,
        )
        self.control = SimpleNamespace(should_training_stop=False)

    def train(self) -> ppo.History:
        """All steps; goes on from the checkpoint in `output_dir`."""
        self._tell("on_train_begin")
        history = self.trainer.train()
        self._tell("on_train_end")
        return history

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """The policy (or its adapters) and the tokenizer, as transformers and peft load them."""
        save_model(Path(output_dir or self.args.output_dir), self.model, self.processing_class)

    def generate_completions(self, sampling: bool = False) -> list[dict[str, Any]]:
        """prompt, completion and score for the evaluation prompts; a few of them with `sampling`.

        By the likeliest tokens: trl had a temperature of 0.01.
        """
        rows = self.trainer.prompts.rows if self.eval_dataset is None else self.eval_dataset
        rows = rows[: self.args.local_rollout_forward_batch_size] if sampling else rows
        prompts, trained = ppo.Prompts(rows, self.processing_class), self.trainer.prompts
        places = list(range(len(prompts)))
        self.trainer.prompts = prompts
        self.trainer.rewards.mode(training=False)
        try:
            rollout = self.trainer.respond(places, 0, greedy=True)
            scores, responses, _ = self.trainer.score(places, rollout.sequences)
        finally:
            self.trainer.prompts = trained
        return [
            {"prompt": prompt, "completion": completion, "score": score}
            for prompt, completion, score in zip(
                responses.prompts, responses.completions, scores.tolist(), strict=True
            )
        ]

    def _behind_step(self, trainer: ppo.PPOTrainer, step: int, line: Mapping[str, float]) -> None:
        self.state.global_step, self.state.episode = step, line["episode"]
        for callback in self.callbacks:
            if not hasattr(callback, "on_step_end"):
                callback(trainer, step, line)
        self._tell("on_step_end")
        if self.control.should_training_stop and step < trainer.steps:
            trainer.steps = step
        if step % self.args.logging_steps == 0 or step == trainer.steps:
            self.state.log_history.append(dict(line))
            self._tell("on_log", logs=dict(line))

    def _tell(self, event: str, **more: Any) -> None:
        told = {"model": self.model, "processing_class": self.processing_class, **more}
        for callback in self.callbacks:
            if hasattr(callback, event):
                control = getattr(callback, event)(self.args, self.state, self.control, **told)
                self.control = control or self.control


class _Trainer(ppo.PPOTrainer):
    """Says when it has saved."""

    saved: Callable[[], None]

    def save(self) -> None:
        super().save()
        self.saved()


class ClassifierReward:
    """`.score` on the state of the last token, as trl read its reward models.

    Args:
        model: sequence classification of transformers; put in evaluation mode.
        batch: responses of a forward.
    """

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.model, self.batch = model.eval(), batch
        self.__name__ = type(unwrap(model)).__name__

    @torch.no_grad()
    def score_sequences(self, sequences: Sequences) -> Tensor:
        """float32 [B]."""
        return torch.cat([self._scores(part) for part in chunks(sequences, self.batch)])

    def _scores(self, sequences: Sequences) -> Tensor:
        bare = unwrap(self.model)
        body = getattr(bare, bare.base_model_prefix)
        states = body(**model_inputs(body, sequences), return_dict=True).last_hidden_state
        last = sequences.prompt_width + sequences.lengths - 1
        return bare.score(states[torch.arange(len(last), device=last.device), last])[:, 0].float()


class NamedAdapterReference(AdapterOffReference):
    """The policy under another of its adapters.

    Args:
        policy: of peft. name: of the adapter.
    """

    def __init__(self, policy: nn.Module, name: str) -> None:
        self.name = name
        super().__init__(policy)

    def acting(self) -> AbstractContextManager[None]:
        return active(self.policy, self.name)


def rows_of(dataset: Any) -> list[dict[str, Any]]:
    """Rows of a dataset; where it has an attention mask, without the padding of its ids."""
    rows = []
    for row in dataset:
        row = {"prompt": row} if isinstance(row, str) else dict(row)
        mask = row.pop("attention_mask", None)
        if mask is not None and "input_ids" in row:
            row["input_ids"] = [i for i, m in zip(row["input_ids"], mask, strict=True) if m]
        rows.append(row)
    return rows


def _reference(
    policy: nn.Module, given: nn.Module | Reference | None, adapter: str | None
) -> Reference | None:
    if isinstance(given, AutoModelForCausalLMWithValueHead):
        given = given.pretrained_model
    if isinstance(given, nn.Module):
        return FrozenReference(given)
    if given is None and adapter is not None:
        return NamedAdapterReference(policy, adapter)
    return given


def _reward(given: Any, args: PPOConfig) -> Any:
    if isinstance(given, nn.Module) and hasattr(unwrap(given), "score"):
        return ClassifierReward(given, args.local_rollout_forward_batch_size)
    return given


def _list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]
