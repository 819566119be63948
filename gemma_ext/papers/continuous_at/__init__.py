"""Efficient adversarial training of LLMs with continuous attacks (arXiv 2405.15589).

| in the paper                                                | here                              |
|-------------------------------------------------------------|-----------------------------------|
| attack on prompt embeddings, sign steps in a ball per token | `Attack`, `AttackConfig`          |
| one-step variant; no attack, the control                    | `one_step()`; `steps=0`           |
| C-AdvUL: toward, away, utility, cut-offs                    | `losses.cut`, `TrainConfig()`     |
| C-AdvIPO                                                    | `losses.ipo`, `TrainConfig.ipo()` |
| training, one perturbation for both answers                 | `ContinuousTrainer`               |
| 100 behaviours x 12 targets, refusals, UltraChat, p = 0.125 | `data`, `Mixture`                 |
| perturbation of blocks (LAT, arXiv 2407.15549)              | `AttackConfig(sites=...)`         |

What differs, on purpose, and what could not be verified, is on docs/papers/continuous_at.md.
Attacks on text, formats and reports that audit a model are in `evaluation`.
"""

from gemma_ext.papers.continuous_at.attack import Attack, AttackConfig, Attacked
from gemma_ext.papers.continuous_at.config import TrainConfig
from gemma_ext.papers.continuous_at.data import (
    Mixture,
    Pair,
    pairs,
    read_refusals,
    read_utility,
    utility_rows,
)
from gemma_ext.papers.continuous_at.embeddings import Embeddings
from gemma_ext.papers.continuous_at.perturbation import EMBEDDINGS, Perturbed
from gemma_ext.papers.continuous_at.probes import attacked_loss, mean_losses, over_refusal
from gemma_ext.papers.continuous_at.prompts import Batch, Encoder, Row
from gemma_ext.papers.continuous_at.references import References
from gemma_ext.papers.continuous_at.target_loss import TargetLoss
from gemma_ext.papers.continuous_at.trainer import ContinuousTrainer, with_lora

__all__ = [
    "EMBEDDINGS",
    "Attack",
    "AttackConfig",
    "Attacked",
    "Batch",
    "ContinuousTrainer",
    "Embeddings",
    "Encoder",
    "Mixture",
    "Pair",
    "Perturbed",
    "References",
    "Row",
    "TargetLoss",
    "TrainConfig",
    "attacked_loss",
    "mean_losses",
    "over_refusal",
    "pairs",
    "read_refusals",
    "read_utility",
    "utility_rows",
    "with_lora",
]
