"""A run that takes seconds and has all the state that a run can have."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from gemma_ext.nn.ppo import FrozenReference
from gemma_ext.ppo import History, PPOConfig, PPOTrainer

VOCABULARY, PAD, END, LIKED = 47, 0, 1, 7
PROMPTS = [{"input_ids": [2 + i, 5 + 3 * i % 40][: 1 + i % 2], "name": f"p{i}"} for i in range(11)]


class Tokenizer:
    """Texts are numbers of tokens with blanks between them."""

    pad_token_id, eos_token_id = PAD, END

    def __call__(self, text: str, **options: Any) -> Any:
        return transformers.BatchEncoding({"input_ids": [int(word) for word in text.split()]})

    def decode(self, ids: Any, **options: Any) -> str:
        return " ".join(str(int(i)) for i in ids if i not in (PAD, END))

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        return [self.decode(row) for row in rows]


def tiny(seed: int = 0, scale: float = 0.3, **options: Any) -> nn.Module:
    """A causal LM of 2 layers, opinionated by `scale`."""
    config = transformers.Gemma2Config(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "sliding_window": 16,
            "attn_implementation": "eager",
            "pad_token_id": PAD,
            "eos_token_id": END,
            **options,
        }
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


class Moving(FrozenReference):
    """The mean of the policies so far: a reference with a state."""

    def after_update(self, policy: nn.Module, step: int) -> dict[str, float]:
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), policy.parameters(), strict=True):
                mine.lerp_(theirs, 0.2)
        return {"reference/step": float(step)}

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.model.load_state_dict(state)


class Centred:
    """Liked tokens, less the mean of all batches so far, and noise from torch's own stream."""

    def __init__(self) -> None:
        self.total, self.count, self.training = 0.0, 0, True

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        found = [ids.count(LIKED) / len(ids) for ids in completion_ids]
        if self.training:
            self.total, self.count = self.total + sum(found), self.count + len(found)
        noise = torch.randn(len(found)).tolist()
        mean = self.total / max(self.count, 1)
        return [value - mean + 0.01 * n for value, n in zip(found, noise, strict=True)]

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def state_dict(self) -> dict[str, float]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total, self.count = state["total"], state["count"]


def trainer(folder: str | Path, *, steps: int = 6, parts: dict[str, Any] | None = None, **options):
    """A trainer whose weights, draws, reference, rewards and coefficient all move."""
    given = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_ppo_epochs": 2,
        "num_mini_batches": 1,
        "response_length": 6,
        "temperature": 1.0,
        "learning_rate": 3e-3,
        "kl_target": 0.5,
        "kl_horizon": 100,
        "save_steps": 2,
        "sample_prompts": 2,
        "output_dir": folder,
        **options,
    }
    config = PPOConfig(**given, total_episodes=1)
    parts = parts or {}
    policy = parts.pop("policy", None) or tiny()
    if "reference" not in parts and not hasattr(policy, "disable_adapter"):
        parts["reference"] = Moving(copy.deepcopy(policy))
    made = PPOTrainer(
        config,
        policy,
        rewards=parts.pop("rewards", None) or Centred(),
        prompts=PROMPTS,
        tokenizer=Tokenizer(),
        show_progress=False,
        **parts,
    )
    made.steps = steps
    return made


def weights(made: PPOTrainer) -> dict[str, torch.Tensor]:
    """All that the run has trained or moved."""
    found = {f"policy.{k}": v for k, v in made.policy.state_dict().items()}
    if made.critic is not None:
        found |= {f"critic.{k}": v for k, v in made.critic.state_dict().items()}
    state = made.reference.state_dict()
    return (
        found
        | {f"reference.{k}": v for k, v in state.items()}
        | {"coefficient": torch.tensor(made.control.coef, dtype=torch.float64)}
    )


def lines(history: History | Path) -> list[str]:
    """Of a history, without the times; text, because nan is not nan."""
    if isinstance(history, Path):
        lines = [json.loads(line) for line in history.read_text().splitlines()]
        kept = [{k: float("nan") if v is None else v for k, v in line.items()} for line in lines]
    else:
        kept = list(history)
    return [
        json.dumps({k: v for k, v in line.items() if not k.startswith("time/")}) for line in kept
    ]
