"""The parts of a run from their names: model, adapters, critic, reference, rewards."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemma_ext.extras import require
from gemma_ext.lm.pretrained import read_pretrained
from gemma_ext.nn.ppo import (
    AdapterCritic,
    AdapterReward,
    Critic,
    FrozenReference,
    SeparateCritic,
    SharedCritic,
    with_adapters,
)
from gemma_ext.nn.ppo.adapters import REWARD, VALUE
from gemma_ext.nn.ppo.critic import width_of
from gemma_ext.ppo.config import PPOConfig
from gemma_ext.ppo.files import load_value_head
from gemma_ext.ppo.rewards import Rewards

_CRITICS = ("shared", "adapter", "copy")
_ALPHA = 2  # of an adapter, times its rank
_OF_ADAPTER = "adapter:"


@dataclass(frozen=True)
class Parts:
    """Arguments of `PPOTrainer`, and rows for a report."""

    arguments: dict[str, Any]
    facts: dict[str, str]


def open_parts(
    config: PPOConfig,
    *,
    model: str | None,
    prompts: Any,
    reward: Any,
    weight: Sequence[float] | None = None,
    value: str | None = None,
    reference: str | None = None,
    lora: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Parts:
    """Opens what a command or a file names.

    Args:
        reward: a name for `load_reward`, or adapter:FOLDER, or several, or `Rewards`. The rest: as
            of the command.

    Raises:
        ValueError: what is missing, or is not there.
    """
    for name, given in (("model", model), ("prompts", prompts), ("reward", reward)):
        if not given:
            raise ValueError(f"{name}: expected one, got none")
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: expected cpu where torch sees no card, got {device}")
    if lora is not None and int(lora) < 1:
        raise ValueError(f"lora: expected a rank of at least 1, got {lora}")
    if value == "adapter" and lora is None:
        raise ValueError("lora: expected a rank for a critic that is an adapter, got none")
    kind = dtype or ("float32" if lora is None else "auto")
    policy, tokenizer = load_causal(str(model), kind, device)
    bare = policy
    if lora is not None:
        policy = with_lora(policy, int(lora), *([VALUE] * (value == "adapter")))
    critic = _critic(value, policy, bare, device) if config.has_critic else None
    if not isinstance(reward, Rewards):
        weights = [weight] if isinstance(weight, (int, float)) else weight
        batch = config.local_rollout_forward_batch_size
        names = [reward] if isinstance(reward, str) else list(reward)
        rewards = [_reward(name, policy, number, batch) for number, name in enumerate(names)]
        reward = Rewards(rewards, weights, None, device, batch)
    held = None
    if reference is not None:
        held = FrozenReference(load_causal(reference, dtype or "auto", device)[0])
    arguments = {
        "policy": policy,
        "reference": held,
        "rewards": reward,
        "prompts": prompts,
        "value": critic,
        "tokenizer": tokenizer,
    }
    facts = {
        "model": str(model),
        "prompts": prompts if isinstance(prompts, str) else f"{len(prompts):,}",
        "rewards": " + ".join(
            f"{w:g} {name}" for w, name in zip(reward.weights, reward.names, strict=True)
        ),
        "critic": (value or "shared") if config.has_critic else "none",
        "trained": "all weights" if lora is None else f"adapters of rank {lora}",
    }
    return Parts(arguments, facts)


def load_causal(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """A causal LM and its tokenizer.

    Args:
        name: "pocket", "pocket:small", a folder, or a name on the hub.

    Raises:
        ValueError: there is none, or no such dtype.
    """
    require("a model of transformers", "hf", "transformers", "tokenizers", "safetensors")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype: expected auto, float32 or bfloat16, got {dtype!r}")
    stored = dtype == "auto"
    kind, _, size = name.partition(":")
    if kind == "pocket":
        from gemma_ext import pocket

        made = pocket.load(size or "nano")
        return made.model.to(device, None if stored else getattr(torch, dtype)), made.tokenizer
    from transformers import AutoModelForCausalLM

    wanted = "expected a folder or hub id of a causal LM"
    weights = dtype if stored else getattr(torch, dtype)
    model, tokenizer = read_pretrained(AutoModelForCausalLM, name, wanted, dtype=weights)
    return model.to(device).eval(), tokenizer


def _critic(value: str | None, policy: Any, bare: nn.Module, device: str) -> Critic:
    if value in (None, "shared"):
        return SharedCritic(width_of(policy))
    if value == "adapter":
        return AdapterCritic(policy)
    if value == "copy":
        if policy is not bare:
            raise ValueError("value: expected shared or adapter beside adapters, got copy")
        return SeparateCritic(copy.deepcopy(bare))
    require("a critic of its own", "hf", "transformers", "safetensors")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(value)
        classifies = "ForSequenceClassification" in (config.architectures or [""])[0]
        kind = "SequenceClassification" if classifies else "CausalLM"
        auto = getattr(transformers, f"AutoModelFor{kind}")
        model = auto.from_pretrained(value, dtype=torch.float32)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"value: expected {', '.join(_CRITICS)}, a folder or a hub id, got {value}: {first}"
        ) from None
    head = None
    if not classifies and Path(value).is_dir():
        try:
            head = load_value_head(value)
        except ValueError:
            head = None  # a model without a head gets a fresh one
    return SeparateCritic(model.to(device), head)


def _reward(name: str, policy: Any, number: int, batch: int) -> Any:
    """The name as it is, or of an adapter's folder what scores by it on the policy's backbone."""
    folder = name.removeprefix(_OF_ADAPTER)
    if folder == name or not Path(folder).is_dir():
        return name
    if not hasattr(policy, "load_adapter") or not hasattr(policy, "peft_config"):
        raise ValueError("lora: expected a rank for a reward that is an adapter, got none")
    from peft import PeftConfig

    own = f"{REWARD}{number or ''}"
    try:
        config = PeftConfig.from_pretrained(folder)
        config.modules_to_save = None  # the head, which is read apart
        config.inference_mode = True
        policy.add_adapter(own, config)
        policy.load_adapter(folder, own, torch_device=str(policy.device))
    except (ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"reward: expected an adapter of the model in {folder}, got: {first}"
        ) from None
    return AdapterReward(policy, load_value_head(folder), own, batch)


def with_lora(model: nn.Module, rank: int, *more: str, seed: int | None = None) -> Any:
    """The model under LoRA on all linear layers but its head, for the policy and each further role.

    Args:
        more: roles, as of `with_adapters`.
        seed: of the draw of its matrices; None draws them from torch's own stream.

    Raises:
        ImportError: peft is missing.
    """
    require("adapters", "ppo", "peft")
    from peft import LoraConfig

    config = LoraConfig(
        r=rank, lora_alpha=_ALPHA * rank, lora_dropout=0.0, target_modules="all-linear"
    )
    if seed is None:
        return with_adapters(model, config, *more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return with_adapters(model, config, *more)
