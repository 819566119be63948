"""A run from beginning to end: train, keep the model, show what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from gemma_ext.ppo import page
from gemma_ext.ppo.config import PPOConfig
from gemma_ext.ppo.files import save_trained, write_samples
from gemma_ext.ppo.history import History
from gemma_ext.ppo.ranks import rank
from gemma_ext.ppo.trainer import PPOTrainer

REPORT, SAMPLES = "report.html", "samples.json"


class Trained(NamedTuple):
    """What a run left.

    Attributes:
        history: metrics of every step.
        folder: of model, history, checkpoint and samples. page: the report.
    """

    history: History
    folder: Path
    page: Path


def train_policy(
    trainer: PPOTrainer, *, title: str, facts: Mapping[str, str] | None = None
) -> Trained:
    """Trains, or goes on; then writes the model, samples and the report into `output_dir`.

    Args:
        facts: more rows for the report's table of settings.
    """
    history = trainer.train()
    after = trainer.samples()
    save_trained(trainer.folder, trainer.policy, trainer.critic, trainer.tokenizer)
    done = Trained(history, trainer.folder, trainer.folder / REPORT)
    if rank() == 0:
        write_samples(trainer.folder / SAMPLES, trainer.before, after)
        page.write(
            done.page,
            history.lines,
            title=title,
            before=trainer.before,
            after=after,
            facts={**(facts or {}), **settings(trainer.config)},
        )
    return done


def settings(config: PPOConfig) -> dict[str, str]:
    """Those that differ from their defaults, and the seed."""
    default = asdict(PPOConfig())
    return {
        name: str(value)
        for name, value in asdict(config).items()
        if (value != default[name] and name != "output_dir") or name == "seed"
    }


def summary(history: History) -> str:
    """The numbers that matter, one to a line."""
    names = (
        "objective/scores", "objective/kl", "objective/kl_per_token", "policy/entropy_avg",
        "val/explained_variance", "response/length", "response/eos_rate",
    )  # fmt: skip
    found = {name: (first, last) for name, first, last in page.ends(history.lines)}
    return "\n".join(
        f"{name:<24}{found[name][0]:>12.4f}{found[name][1]:>12.4f}"
        for name in names
        if name in found
    )
