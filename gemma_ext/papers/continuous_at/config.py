"""How a model is hardened: the paper's defaults, and the released code's names for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from gemma_ext.papers.continuous_at.attack import AttackConfig
from gemma_ext.papers.continuous_at.losses import AWAY_CUTOFF, TOWARD_CUTOFF

LOSSES = ("ul", "ipo")
# of the released code's configuration: dotted key -> (part of ours, name there)
ALIASES = {
    "adversarial.iters": ("attack", "steps"),
    "adversarial.eps": ("attack", "eps_rel"),
    "adversarial.init_type": ("attack", "init"),
    "adversarial.opt_config.type": ("attack", "step"),
    "adversarial.opt_config.lr": ("attack", "rate"),
    "trainer_hparams.away_weight": ("run", "away_weight"),
    "trainer_hparams.toward_weight": ("run", "toward_weight"),
    "trainer_hparams.utility_weight": ("run", "utility_weight"),
    "trainer_hparams.away_cutoff": ("run", "away_cutoff"),
    "trainer_hparams.toward_cutoff": ("run", "toward_cutoff"),
    "trainer_hparams.trainer_type": ("run", "loss"),
    "trainer_hparams.dpo_beta": ("run", "beta"),
    "dataset.probabilities": ("run", "adversarial"),
    "sfttrainer.max_seq_length": ("run", "max_length"),
}


@dataclass(frozen=True)
class TrainConfig:
    """A run of C-AdvUL (`TrainConfig()`) or C-AdvIPO (`TrainConfig.ipo()`).

    Attributes:
        loss: "ul" or "ipo" (`losses`).
        attack: the inner attack.
        steps: of the optimiser. batch: samples of a step. micro_batch: rows that are run at once.
        adversarial: probability of a sample to be adversarial.
        max_length: of a row.
        away_weight, toward_weight, utility_weight, away_cutoff, toward_cutoff: of UL.
        beta: of IPO. ipo_token_floor: see `losses.floored`.
        reference_compatible: cut-offs and token floor as the released code has them.
        learning_rate, weight_decay, clip: AdamW, norm of gradients; cosine to 0.
        rank, alpha, dropout: of LoRA in all linear layers.
        evaluate_every: steps between held-out attacks and probes; 0 for the end only.
        log_every, save_every: steps.
        seed: of samples and dropout.

    Raises:
        ValueError: a value that does not fit.
    """

    loss: str = "ul"
    attack: AttackConfig = field(default_factory=AttackConfig)
    steps: int = 780
    batch: int = 64
    micro_batch: int = 8
    adversarial: float = 0.125
    max_length: int = 256
    away_weight: float = 0.5
    toward_weight: float = 0.5
    utility_weight: float = 1.0
    away_cutoff: float = AWAY_CUTOFF
    toward_cutoff: float = TOWARD_CUTOFF
    beta: float = 0.25
    ipo_token_floor: bool = False
    reference_compatible: bool = False
    learning_rate: float = 2e-4
    weight_decay: float = 1e-3
    clip: float = 0.3
    rank: int = 64
    alpha: int = 16
    dropout: float = 0.1
    evaluate_every: int = 0
    log_every: int = 1
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected ul or ipo, got {self.loss!r}")
        for name in ("steps", "batch", "micro_batch", "log_every", "save_every", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.adversarial <= 1:
            raise ValueError(f"adversarial: expected a probability, got {self.adversarial}")
        if not self.beta > 0:
            raise ValueError(f"beta: expected a number above 0, got {self.beta}")

    @classmethod
    def ipo(cls, **values: Any) -> TrainConfig:
        """C-AdvIPO with its defaults: 360 steps of adversarial samples, rows of 128."""
        return cls(**{"loss": "ipo", "steps": 360, "adversarial": 1.0, "max_length": 128, **values})

    @classmethod
    def from_reference(cls, config: Mapping[str, Any]) -> TrainConfig:
        """Of the released code's configuration, nested or dotted; what is not named is ours.

        Raises:
            ValueError: a key that has no counterpart here, an inner attack or loss that is unknown.
        """
        given = dict(_dotted(config))
        unknown = [key for key in given if key not in ALIASES]
        if unknown:
            raise ValueError(
                f"config: expected keys among {', '.join(ALIASES)}, got {', '.join(unknown)}"
            )
        parts: dict[str, dict[str, Any]] = {"attack": {}, "run": {}}
        for key, value in given.items():
            part, name = ALIASES[key]
            parts[part][name] = value
        probabilities = parts["run"].get("adversarial")
        if isinstance(probabilities, (list, tuple)):
            parts["run"]["adversarial"] = float(probabilities[0])
        if parts["attack"].get("init") in ("zeros", "zero"):
            parts["attack"]["init"] = "zero"
        loss = str(parts["run"].pop("loss", "ul")).lower()
        made = cls.ipo() if loss == "ipo" else cls(loss=loss)
        attack = replace(made.attack, **parts["attack"])
        return replace(made, attack=attack, **parts["run"])

    def factor(self, step: int) -> float:
        """Of the learning rate in step `step`, counted from 0: half a cosine to 0."""
        return 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def identity(self) -> dict[str, Any]:
        """What a resumed run has to share with the one before."""
        left_out = ("log_every", "save_every", "evaluate_every", "attack", "micro_batch")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return own | {f"attack.{f.name}": getattr(self.attack, f.name) for f in fields(self.attack)}


def _dotted(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _dotted(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
