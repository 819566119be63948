"""PPO, SALSA and their relatives from one pair of parents, measured along the way.

Every run is measured on held-out prompts at a few steps: reward, length, ends, and the divergence
of its responses from the pretrained model, from each parent and from the soup, each step of a
response summed over the whole vocabulary. What is compared are these points, never runs at one
beta.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemma_ext.nn.ppo import FrozenReference, Reference
from gemma_ext.papers.salsa.checks import step_zero
from gemma_ext.papers.salsa.frontier import Difference, Frontier, compare, interval
from gemma_ext.papers.salsa.references import MultiReference, SoupReference, ema
from gemma_ext.papers.salsa.soup import soup
from gemma_ext.papers.salsa.training import Options, SalsaTrainer
from gemma_ext.ppo import PPOConfig, PPOTrainer, Prompts, Responses
from gemma_ext.ppo.metrics import ended
from gemma_ext.ppo.opening import with_lora
from gemma_ext.ppo.rollout import seed_of

METHODS = ("ppo", "salsa", "soup start", "multi-kl", "ema")
BASELINE = "ppo"
Record = Mapping[str, Any]


def parts_of(
    method: str,
    parents: Sequence[nn.Module],
    alpha: float = 0.5,
    decay: float = 0.9,
    **what: Any,
) -> tuple[nn.Module, Reference]:
    """(policy, reference) of a method; both are the caller's to change.

    Args:
        what: is trained of the policy, as of `trainable`.

    Raises:
        ValueError: an unknown method, or an average of what has adapters.
    """
    first, weights = parents[0], [alpha, 1 - alpha]
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method == "soup start":
        return trainable(soup(parents, weights), **what), SoupReference(parents, weights)
    if method == "ema" and what.get("lora"):
        raise ValueError(f"lora: expected 0 for ema, which averages weights, got {what['lora']}")
    policy = trainable(copy.deepcopy(first), **what)
    if method == "salsa":
        return policy, SoupReference(parents, weights)
    if method == "multi-kl":
        return policy, MultiReference(list(map(copy.deepcopy, parents)), weights)
    kept = copy.deepcopy(first)
    return policy, FrozenReference(kept) if method == "ppo" else ema(kept, decay, shadow=True)


def trainable(model: nn.Module, embeddings: bool = True, lora: int = 0, seed: int = 0) -> nn.Module:
    """The model with gradients.

    Args:
        embeddings: of the token embeddings as well.
        lora: rank of adapters that are trained instead; 0 for none. seed: of their draw.
    """
    if lora:
        return with_lora(model, lora, seed=seed)
    model.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(embeddings)
    return model


@dataclass(frozen=True)
class Setting:
    """What all runs of a study share.

    Attributes:
        steps, batch: batches of a run, responses of each.
        length: most tokens of a response.
        rate, value_rate: learning rates.
        betas: weights of the penalty, a run for each.
        temperature: of draws and log-probabilities.
        alpha: of the soup. decay: of the moving average, for each step.
        every: steps from one measurement to the next.
        embeddings: whether the policy's token embeddings, most of a small model, are trained.
        lora: rank of adapters that are trained instead of weights; 0 for none.
        options: of `SalsaTrainer`, the same for all.
    """

    steps: int = 24
    batch: int = 32
    length: int = 20
    rate: float = 3e-4
    value_rate: float = 1e-3
    betas: tuple[float, ...] = (0.05, 0.2)
    temperature: float = 1.0
    alpha: float = 0.5
    decay: float = 0.9
    every: int = 8
    embeddings: bool = True
    lora: int = 0
    options: Options = field(default_factory=Options)

    def config(self, folder: Path, beta: float, seed: int) -> PPOConfig:
        return PPOConfig(
            output_dir=folder,
            total_episodes=self.steps * self.batch,
            per_device_train_batch_size=self.batch,
            response_length=self.length,
            learning_rate=self.rate,
            value_learning_rate=self.value_rate,
            temperature=self.temperature,
            kl_coef=beta,
            seed=seed,
            save_steps=self.steps,
            sample_prompts=2,
        )


def run(
    method: str,
    beta: float,
    seed: int,
    *,
    setting: Setting,
    parents: Sequence[nn.Module],
    anchors: Mapping[str, nn.Module],
    rewards: Any,
    prompts: Sequence[str],
    held_out: Sequence[str],
    tokenizer: Any,
    folder: Path,
    show_progress: bool = True,
) -> dict[str, Any]:
    """One run: its points, what was paid at step 0, and why it ended.

    Args:
        anchors: models by name that divergences are measured to.
        folder: of the run.

    Returns:
        {"method", "beta", "seed", "zero", "stopped", "points": [{"step", "reward", "length_mean",
        "eos_rate", "kl_NAME", ..}, ..], "samples"}, the point of step 0 first.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run, whose points are lost
    what = {"embeddings": setting.embeddings, "lora": setting.lora, "seed": seed}
    policy, reference = parts_of(method, parents, setting.alpha, setting.decay, **what)
    questions = Prompts(held_out, tokenizer)
    points: list[dict[str, float]] = []

    def measured(trainer: PPOTrainer, step: int, line: Mapping[str, float]) -> None:
        if step % setting.every == 0 or step == trainer.steps:
            points.append({"step": step, **measure(trainer, questions, anchors, seed)})

    trainer = SalsaTrainer(
        setting.config(folder, beta, seed),
        policy,
        reference,
        rewards,
        Prompts(prompts, tokenizer),
        tokenizer=tokenizer,
        options=setting.options,
        callbacks=[measured],
        show_progress=show_progress,
    )
    points.append({"step": 0, **measure(trainer, questions, anchors, seed)})
    trainer.train()
    return {
        "method": method,
        "beta": beta,
        "seed": seed,
        "zero": trainer.zero,
        "stopped": trainer.stopped,
        "points": points,
        "samples": trainer.samples(),
    }


def measure(
    trainer: PPOTrainer, prompts: Prompts, anchors: Mapping[str, nn.Module], seed: int
) -> dict[str, float]:
    """Reward, lengths and divergences of the policy as it is, on prompts it was not trained on.

    The draws of a prompt have the same random numbers in every run of a seed.
    """
    rows = list(range(len(prompts)))
    seeds = [seed_of(seed, "held out", row) for row in rows]
    with torch.no_grad():
        rollout = trainer.sampler(trainer.policy, [prompts.ids(row) for row in rows], seeds)
    sequences = rollout.sequences
    trainer.rewards.mode(training=False)
    scores, _ = trainer.rewards(Responses.of(prompts, rows, sequences, trainer.tokenizer))
    found = step_zero(
        trainer.policy,
        anchors,
        sequences,
        ended(sequences, trainer.ends),
        trainer.config.temperature,
    )
    return {"reward": float(scores.nanmean()), **found}


def frontiers(records: Sequence[Record], anchor: str) -> dict[str, dict[int, Frontier]]:
    """By method and seed: the best reward within a divergence from an anchor, of all betas."""
    points: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for record in records:
        place = points.setdefault(record["method"], {}).setdefault(record["seed"], [])
        place += [(max(0.0, p[f"kl_{anchor}"]), p["reward"]) for p in record["points"]]
    return {
        method: {seed: Frontier(some) for seed, some in by_seed.items()}
        for method, by_seed in points.items()
    }


def comparison(
    records: Sequence[Record], anchor: str, *, baseline: str = BASELINE, places: int = 5
) -> dict[str, list[Difference]]:
    """Every method against the baseline at equal divergence from an anchor."""
    found = frontiers(records, anchor)
    return {
        method: compare(by_seed, found[baseline], places)
        for method, by_seed in found.items()
        if method != baseline
    }


def anchors_of(records: Sequence[Record]) -> list[str]:
    """Models that all points have a divergence from, those that are further from a run first."""
    sets = [set(point) for record in records for point in record["points"]]
    order = ("theta_0", "sft_1", "soup")
    return [name for name in order if all(f"kl_{name}" in names for names in sets)]


def ends(records: Sequence[Record], names: Sequence[str]) -> list[dict[str, Any]]:
    """By method and beta: mean and half interval over seeds of the last point's numbers."""
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        groups.setdefault((record["method"], record["beta"]), []).append(record)
    return [
        {
            "method": method,
            "beta": beta,
            "seeds": len(some),
            "stopped": sum(record["stopped"] is not None for record in some),
            **{name: interval([r["points"][-1][name] for r in some]) for name in names},
        }
        for (method, beta), some in groups.items()
    ]


def study(
    setting: Setting,
    *,
    seeds: Sequence[int],
    methods: Sequence[str] = METHODS,
    parents: Callable[[int], Sequence[nn.Module]],
    theta_0: nn.Module,
    kept: Callable[[str, Callable[[], Any]], Any],
    folder: Path,
    **rest: Any,
) -> list[Record]:
    """Every method at every beta for every seed, with parents of its own for each seed.

    Args:
        parents: of a seed.
        theta_0: the model before the SFT.
        kept: of `report.Kept`: finished runs are not made again.
        rest: of `run`.
    """

    @cache
    def of_seed(seed: int) -> tuple[Sequence[nn.Module], dict[str, nn.Module]]:
        two = parents(seed)
        made = soup(two, [setting.alpha, 1 - setting.alpha])
        return two, {"theta_0": theta_0, "sft_1": two[0], "soup": made}

    def one(method: str, beta: float, seed: int) -> dict[str, Any]:
        two, anchors = of_seed(seed)
        place = folder / f"{method}-{beta:g}-{seed}".replace(" ", "-")
        return run(
            method, beta, seed, setting=setting, parents=two, anchors=anchors, folder=place, **rest
        )

    return [
        kept(f"{method}, beta {beta:g}, seed {seed}", partial(one, method, beta, seed))
        for beta in setting.betas
        for seed in seeds
        for method in methods
    ]


def facts(setting: Setting) -> dict[str, str]:
    """Rows for a table of settings."""
    return {name.replace("_", " "): str(value) for name, value in asdict(setting).items()}
