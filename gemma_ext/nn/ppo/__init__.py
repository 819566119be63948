"""Proximal policy optimisation: sequences, references, values and the tensor functions."""

from gemma_ext.nn.ppo.adapter_reward import AdapterReward
from gemma_ext.nn.ppo.adapters import active, with_adapters
from gemma_ext.nn.ppo.advantages import SCALES, grpo, reinforce_plus_plus, remax, rloo
from gemma_ext.nn.ppo.aggregation import AGGREGATIONS, Counts, aggregate, count, token_weights
from gemma_ext.nn.ppo.critic import AdapterCritic, Critic, SeparateCritic, SharedCritic
from gemma_ext.nn.ppo.gae import packed_gae, padded_gae
from gemma_ext.nn.ppo.hidden import HiddenHead, Read, exact_kl, read
from gemma_ext.nn.ppo.kl import KL_ESTIMATORS, full_kl, kl_estimate
from gemma_ext.nn.ppo.kl_control import AdaptiveKL, FixedKL
from gemma_ext.nn.ppo.losses import PolicyLoss, ValueLoss, entropy_loss, policy_loss, value_loss
from gemma_ext.nn.ppo.metrics import explained_variance, policy_metrics
from gemma_ext.nn.ppo.off_policy import importance_weights
from gemma_ext.nn.ppo.packing import padded, rows_of, sequence_sum, spread
from gemma_ext.nn.ppo.reference import AdapterOffReference, FrozenReference, Reference
from gemma_ext.nn.ppo.sequences import Sequences
from gemma_ext.nn.ppo.value import ValueHead
from gemma_ext.nn.ppo.whitening import Moments, moments, whiten

__all__ = [
    "AGGREGATIONS",
    "KL_ESTIMATORS",
    "SCALES",
    "AdapterCritic",
    "AdapterOffReference",
    "AdapterReward",
    "AdaptiveKL",
    "Counts",
    "Critic",
    "FixedKL",
    "FrozenReference",
    "HiddenHead",
    "Moments",
    "PolicyLoss",
    "Read",
    "Reference",
    "SeparateCritic",
    "Sequences",
    "SharedCritic",
    "ValueHead",
    "ValueLoss",
    "active",
    "aggregate",
    "count",
    "entropy_loss",
    "exact_kl",
    "explained_variance",
    "full_kl",
    "grpo",
    "importance_weights",
    "kl_estimate",
    "moments",
    "packed_gae",
    "padded",
    "padded_gae",
    "policy_loss",
    "policy_metrics",
    "read",
    "reinforce_plus_plus",
    "remax",
    "rloo",
    "rows_of",
    "sequence_sum",
    "spread",
    "token_weights",
    "value_loss",
    "whiten",
    "with_adapters",
]
