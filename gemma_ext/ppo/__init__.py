"""Proximal policy optimisation of causal language models, with a critic or without."""

from gemma_ext.ppo.config import PPOConfig
from gemma_ext.ppo.history import History
from gemma_ext.ppo.prompts import Prompts, read_prompts
from gemma_ext.ppo.responses import Responses
from gemma_ext.ppo.reward_models import load_reward
from gemma_ext.ppo.rewards import Rewards
from gemma_ext.ppo.rollout import Generate, Rollout, Sampler
from gemma_ext.ppo.run import Trained, summary, train_policy
from gemma_ext.ppo.trainer import PPOTrainer

__all__ = [
    "Generate",
    "History",
    "PPOConfig",
    "PPOTrainer",
    "Prompts",
    "Responses",
    "Rewards",
    "Rollout",
    "Sampler",
    "Trained",
    "load_reward",
    "read_prompts",
    "summary",
    "train_policy",
]
