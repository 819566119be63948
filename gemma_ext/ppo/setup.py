"""What a run settles before its first step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gemma_ext.nn._models import unwrap
from gemma_ext.nn.ppo import (
    AdapterOffReference,
    AdaptiveKL,
    Critic,
    FixedKL,
    FrozenReference,
    Reference,
    SeparateCritic,
    SharedCritic,
)
from gemma_ext.nn.ppo.adapters import peft_or_bare
from gemma_ext.nn.ppo.critic import width_of
from gemma_ext.ppo.config import PPOConfig
from gemma_ext.ppo.prompts import Prompts
from gemma_ext.ppo.rewards import Rewards
from gemma_ext.ppo.rollout import Generate, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHARES = ("dropout", "attention_dropout", "hidden_dropout", "activation_dropout")


def ends_of(config: PPOConfig, policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a response, as `stop_token` and `stop_token_id` say.

    Raises:
        ValueError: both are given, a text that is not one token, an id that the model does not
            have, or none where one is needed.
    """
    found = _ends(config, policy, tokenizer)
    if not found and (config.stop_token == "eos" or config.missing_eos_penalty is not None):
        name = "stop_token" if config.stop_token == "eos" else "missing_eos_penalty"
        raise ValueError(
            f"{name}: expected a model or tokenizer with a token that ends a text, got none; "
            "stop_token_id names one"
        )
    return found


def _ends(config: PPOConfig, policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if config.stop_token is not None and config.stop_token_id is not None:
        raise ValueError("stop_token_id: expected None beside a stop_token, got both")
    if config.stop_token_id is not None:
        size = _text_config(policy, "vocab_size")
        if size is not None and not 0 <= config.stop_token_id < size:
            raise ValueError(
                f"stop_token_id: expected an id below {size}, got {config.stop_token_id}"
            )
        return [config.stop_token_id]
    if config.stop_token not in (None, "eos"):
        ids = tokenizer(config.stop_token, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(
                f"stop_token: expected one token, got {len(ids)} of {config.stop_token!r}"
            )
        return ids
    own = getattr(getattr(unwrap(policy), "generation_config", None), "eos_token_id", None)
    if config.stop_token == "eos" or own is None:
        own = tokenizer.eos_token_id
    if own is None:
        return []
    return [own] if isinstance(own, int) else list(own)


def _text_config(policy: nn.Module, name: str) -> Any:
    config = getattr(unwrap(policy), "config", None)
    return None if config is None else getattr(config.get_text_config(), name, None)


def check_lengths(
    config: PPOConfig, policy: nn.Module, prompts: Prompts, rows: Iterable[int]
) -> None:
    """Whether the model has positions for some prompts and their responses.

    Raises:
        ValueError: it has not.
    """
    most = _text_config(policy, "max_position_embeddings")
    if not isinstance(most, int) or most < 1:
        return
    room = most - config.response_length
    if room < 1:
        raise ValueError(
            f"response_length: expected at most {most - 1} in a model of {most} positions, got "
            f"{config.response_length}"
        )
    if prompts.max_length is not None and prompts.max_length <= room:
        return
    for row in rows:
        if (length := len(prompts.ids(row))) > room:
            raise ValueError(
                f"prompts: expected at most {room} tokens beside the {config.response_length} of a "
                f"response in a model of {most} positions, got {length} in row {row}; "
                f"max_prompt_length cuts them"
            )


def pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token id of padding, which nothing ever looks at."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def without_dropout(config: PPOConfig, *models: nn.Module) -> None:
    """Turns dropout off, so that the first ratio is 1.

    In evaluation mode nothing drops out; transformers checkpoints gradients in training mode only,
    where all shares are set to 0.

    Raises:
        ValueError: checkpointing is asked for and a model has none.
    """
    for model in models:
        model.train(config.gradient_checkpointing)
        if not config.gradient_checkpointing:
            continue
        bare = unwrap(model)
        if not getattr(bare, "supports_gradient_checkpointing", False):
            raise ValueError(
                f"gradient_checkpointing: expected False for {type(bare).__name__}, got True"
            )
        bare.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
            for name in _SHARES:
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)


def critic_of(value: Critic | nn.Module | None, policy: nn.Module) -> Critic:
    """A critic as it is, a model as one of its own, or a head on the policy's states."""
    if isinstance(value, Critic):
        return value
    return SharedCritic(width_of(policy)) if value is None else SeparateCritic(value)


def sampler_of(config: PPOConfig, ends: Sequence[int], pad: int) -> Sampler:
    """What the settings name."""
    if config.rollouts == "generate":
        return Generate(config, ends, pad)
    from gemma_ext.ppo.engine_rollout import EngineSampler

    return EngineSampler(config, ends, pad)


def prompts_of(config: PPOConfig, prompts: Any, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """As they are, or of what `Prompts` takes."""
    if isinstance(prompts, Prompts):
        return prompts
    return Prompts(prompts, tokenizer, config.max_prompt_length)


def rewards_of(config: PPOConfig, rewards: Any, tokenizers: Any, device: torch.device) -> Rewards:
    """As they are, or of what `Rewards` takes."""
    if isinstance(rewards, Rewards):
        return rewards
    batch = config.local_rollout_forward_batch_size
    return Rewards(rewards, tokenizers=tokenizers, device=device, batch=batch)


def control_of(config: PPOConfig) -> FixedKL | AdaptiveKL:
    """Of beta."""
    if config.kl_target is None:
        return FixedKL(config.kl_coef)
    return AdaptiveKL(config.kl_coef, config.kl_target, horizon=config.kl_horizon)


def reference_of(policy: nn.Module) -> Reference:
    """The policy without its adapters, or a copy of it as it is now.

    Raises:
        ValueError: a sharded policy, which cannot be copied.
    """
    if hasattr(peft_or_bare(policy), "disable_adapter"):
        return AdapterOffReference(policy)
    if any(isinstance(p, DTensor) for p in policy.parameters()):
        raise ValueError("reference: expected one beside a sharded policy, got None")
    return FrozenReference(copy.deepcopy(peft_or_bare(policy)))
