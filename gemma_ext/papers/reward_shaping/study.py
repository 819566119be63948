"""The study: PPO on a planted reward model under every rule, several seeds, one curve each."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import nn

from gemma_ext.lm import HuggingFaceModel, Sampling
from gemma_ext.lm.identity import identity
from gemma_ext.papers.reward_shaping.hooks import COLUMN, shape
from gemma_ext.papers.reward_shaping.monitors import HackingMonitor
from gemma_ext.papers.reward_shaping.planted import GOLD, Planted
from gemma_ext.papers.reward_shaping.references import References, draw_references, fingerprint
from gemma_ext.papers.reward_shaping.shaping import RULES, Shaping
from gemma_ext.ppo import PPOConfig, PPOTrainer
from gemma_ext.ppo.opening import with_lora
from gemma_ext.report import interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CURVES = {
    "gold": "study/gold",
    "proxy": "study/proxy",
    "marks": "study/marks",
    "win": "study/win",
    "shaped": "objective/scores",
    "kl": "objective/kl",
    "critic": "loss/value_avg",
    "centred": "proxy/centred",
    "saturated": "proxy/saturated",
}
LATE = 0.25  # of the steps, that final figures are means of
COLLAPSED = 0.5  # of its peak: a run whose gold ends below it


@dataclass(frozen=True)
class Plan:
    """Settings of a study.

    Attributes:
        steps: of PPO, `batch` responses of `length` tokens each.
        beta: price of a nat of divergence, the paper's.
        temperature: of drafts and of references.
        references: M of each prompt.
        ceil: of the rule of that name, in units of the proxy.
        lora: rank of adapters; 0 trains all weights, which then have to be float32.
    """

    steps: int = 48
    batch: int = 32
    length: int = 12
    learning_rate: float = 5e-4
    epochs: int = 2
    beta: float = 0.005
    temperature: float = 0.9
    references: int = 10
    ceil: float = 5.0
    lora: int = 0
    planted: Planted = field(default_factory=Planted)

    def shaping(self, rule: str) -> Shaping:
        """Of a rule by name."""
        return replace(RULES[rule], ceil=self.ceil) if rule == "ceil" else RULES[rule]


def references(
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    path: Path,
    *,
    show_progress: bool = True,
) -> list[References]:
    """What the policy before training writes, scored by the proxy; from the file if it is there."""
    sampling = Sampling(max_tokens=plan.length, temperature=plan.temperature, seed=1)
    name = fingerprint(identity(model), repr(plan.planted), sampling, plan.references)
    lm = HuggingFaceModel(model, tokenizer, show_progress=False)
    options = {"count": plan.references, "sampling": sampling, "show_progress": show_progress}
    return draw_references(prompts, lm, plan.planted, path, name, **options)


def train(
    plan: Plan,
    rule: str,
    seed: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[References],
    folder: Path,
    *,
    show_progress: bool = True,
) -> dict[str, Any]:
    """One run of PPO: its curves by name (`CURVES`), its alarms and its last responses.

    The folder has the trainer's checkpoint while it runs, so that a run which was stopped goes on,
    and is taken away when it is done.
    """
    monitor = HackingMonitor()
    reward = shape(plan.planted, plan.shaping(rule), monitor=monitor)
    data = [
        {
            "prompt": row.prompt,
            COLUMN: list(row.rewards),
            GOLD: [plan.planted.gold(text) for text in row.completions],
        }
        for row in rows
    ]
    config = PPOConfig(
        output_dir=folder,
        total_episodes=plan.steps * plan.batch,
        per_device_train_batch_size=plan.batch,
        num_ppo_epochs=plan.epochs,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="constant",
        response_length=plan.length,
        temperature=plan.temperature,
        kl_coef=plan.beta,
        save_steps=max(1, plan.steps // 3),
        seed=seed,
    )
    trainer = PPOTrainer(
        config, _policy(plan, model, seed), None, reward, data, tokenizer=tokenizer,
        show_progress=show_progress,
    )  # fmt: skip
    history = trainer.train()
    found = {
        "rule": rule,
        "seed": seed,
        "curves": {name: history[key] for name, key in CURVES.items()},
        "alarms": monitor.alarms,
        "samples": trainer.samples(),
    }
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _policy(plan: Plan, model: PreTrainedModel, seed: int) -> nn.Module:
    """What is trained: a copy, under adapters drawn from the seed where the plan has them."""
    policy = copy.deepcopy(model)
    return with_lora(policy, plan.lora, seed=seed) if plan.lora else policy


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the runs of one rule: how many, how many collapsed, and of each number (mean over seeds,
    half of its 95 % interval or None).

    "start" is the first batch, before any update; "peak" the best mean of a window of the length
    that "final" is a mean of, the last `LATE` of the steps. A run collapsed whose gold ends below
    `COLLAPSED` of its peak.
    """
    rows = [_of_run(run["curves"]) for run in runs]
    found: dict[str, Any] = {
        "rule": runs[0]["rule"],
        "seeds": len(runs),
        "collapsed": sum(row["kept"] < COLLAPSED for row in rows),
    }
    for key in rows[0]:
        found[key] = interval([row[key] for row in rows])
    return found


def _of_run(curves: Mapping[str, Sequence[float]]) -> dict[str, float]:
    width = max(1, round(LATE * len(curves["gold"])))
    gold = windows(curves["gold"], width)
    last = {f"{name}_final": fmean(curves[name][-width:]) for name in CURVES}
    peak = max(gold)
    return {
        "gold_start": curves["gold"][0],
        "gold_peak": peak,
        "kept": last["gold_final"] / peak if peak else 1.0,
        "shaped_high": max(curves["shaped"]),
        **last,
    }


def windows(values: Sequence[float], width: int) -> list[float]:
    """Means of all windows."""
    return [fmean(values[at : at + width]) for at in range(len(values) - width + 1)]


def facts(plan: Plan) -> dict[str, Any]:
    """A plan as a record."""
    return asdict(plan)
