"""Reward models from preferences, by the trainer of `transformers`: Bradley-Terry, Reg, ODIN."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_ext.extras import require
from gemma_ext.lm.text import Text
from gemma_ext.papers.reward_shaping.losses import REG, bradley_terry, odin_penalties
from gemma_ext.papers.reward_shaping.reward_model import LENGTH, QUALITY, score_head, scores
from gemma_ext.progress import Advance, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

KINDS = ("bt", "reg", "odin")
# (batch, learning rate, seed, examples) of the five runs that the study averages for WARM
WARM_RUNS = (
    (32, 7e-6, 23, 9_700),
    (32, 6e-6, 24, 14_300),
    (24, 5e-6, 25, 19_200),
    (24, 4e-6, 26, 24_000),
    (24, 3e-6, 27, 28_800),
)


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, the preferred one first."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class RewardTraining:
    """How a reward model is trained; defaults are the study's.

    Attributes:
        kind: "bt", "reg" or "odin"; the last takes a model of two heads.
        batch: pairs of a step and rank.
        epochs: over the pairs; `steps`, where given, counts instead.
        reg: weight of the squares of Reg.
        length_weight, overlap_weight: of ODIN's two penalties.
        max_length: tokens of prompt and response; a longer one loses its start.
    """

    kind: str = "bt"
    learning_rate: float = 5e-6
    batch: int = 32
    epochs: float = 1.0
    steps: int | None = None
    grad_norm: float = 5.0
    warmup_ratio: float = 0.1
    reg: float = REG
    length_weight: float = 1.0
    overlap_weight: float = 1.0
    max_length: int = 1024
    bf16: bool = False
    seed: int = 22

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")


def train_reward_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Pair | Mapping[str, str]],
    config: RewardTraining = RewardTraining(),
    *,
    out: str | Path = "out/reward",
    show_progress: bool = True,
) -> list[dict[str, float]]:
    """Trains `model` in place.

    Args:
        model: a sequence classifier, of `from_causal` or `load_reward_model`.
        pairs: or mappings with "prompt", "chosen" and "rejected".
        out: folder of the trainer.

    Returns:
        What was logged, by step: loss, accuracy and, of ODIN, "length_penalty" and "overlap".

    Raises:
        ValueError: no pairs, or ODIN with another number of heads than two.
        ImportError: transformers or accelerate is missing.
    """
    made = preference_trainer(model, tokenizer, pairs, config, out=out)
    total = _steps(config, len(made.train_dataset))
    with progress_bar(f"reward model, {config.kind}", total, show_progress) as advance:
        made.add_callback(_bar(advance))
        made.train()
    model.eval()
    return [row for row in made.state.log_history if "loss" in row]


def preference_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Pair | Mapping[str, str]],
    config: RewardTraining = RewardTraining(),
    *,
    out: str | Path = "out/reward",
    **arguments: Any,
) -> Trainer:
    """The trainer of `train_reward_model`; `arguments` are further ones of TrainingArguments.

    It prints nothing unless `disable_tqdm=False` is among them.
    """
    require("training of reward models", "hf", "transformers", "accelerate")
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    heads = model.config.num_labels
    if config.kind == "odin" and heads != 2:
        raise ValueError(f"model: expected 2 heads for odin, got {heads}")
    examples = encode_pairs(tokenizer, pairs, config.max_length)
    if not examples:
        raise ValueError("pairs: expected at least one, got none")
    text = model.config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = tokenizer.pad_token_id

    class PreferenceTrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any
        ) -> Any:
            loss, found = preference_loss(model, inputs["rows"], inputs["tokens"], config)
            for key, value in found.items():
                self._found.setdefault(key, []).append(value)
            return (loss, found) if return_outputs else loss

        def log(self, logs: dict[str, float], *more: Any) -> None:
            logs |= {key: sum(values) / len(values) for key, values in self._found.items()}
            self._found.clear()
            super().log(logs, *more)

    total = _steps(config, len(examples))
    options = {
        "output_dir": str(out),
        "per_device_train_batch_size": config.batch,
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.epochs,
        "max_steps": config.steps or -1,
        "max_grad_norm": config.grad_norm,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": max(1, round(config.warmup_ratio * total)),
        "bf16": config.bf16,
        "logging_steps": max(1, total // 20),
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": next(model.parameters()).device.type == "cpu",
        "seed": config.seed,
        **arguments,
    }
    made = PreferenceTrainer(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=examples,
        data_collator=collate,
    )
    made._found = {}
    if made.args.disable_tqdm:
        made.remove_callback(PrinterCallback)
    return made


def _steps(config: RewardTraining, examples: int) -> int:
    return config.steps or max(1, round(config.epochs * examples / config.batch))


def _bar(advance: Advance) -> TrainerCallback:
    """Moves a bar by every step, with what was logged last as its note."""
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            advance(1)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                advance(0, f"loss {float(logs['loss']):.3f}, accuracy {logs['accuracy']:.2f}")

    return Bar()


def preference_loss(
    model: Any, rows: Sequence[list[int]], tokens: Tensor, config: RewardTraining
) -> tuple[Tensor, dict[str, float]]:
    """Loss of a batch of pairs and what to log.

    Args:
        rows: 2 B rows of ids, the chosen ones first.
        tokens: [2 B] lengths of the responses.
    """
    found = scores(model, rows).float()
    quality = found[:, QUALITY]
    chosen, rejected = quality.chunk(2)
    facts = {"accuracy": float((chosen > rejected).float().mean())}
    if config.kind != "odin":
        return bradley_terry(chosen, rejected, config.reg if config.kind == "reg" else 0.0), facts
    total = found.sum(1)
    loss = bradley_terry(*total.chunk(2))
    weight = score_head(model).weight
    apart, overlap = odin_penalties(quality, found[:, LENGTH], tokens.to(found.device), weight)
    facts |= {"length_penalty": float(apart.detach()), "overlap": float(overlap.detach())}
    return loss + config.length_weight * apart + config.overlap_weight * overlap, facts


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Pair | Mapping[str, str]],
    max_length: int,
) -> list[dict[str, Any]]:
    """Ids of both texts of each pair, and the tokens of both responses."""
    found = [pair if isinstance(pair, Pair) else Pair(**dict(pair)) for pair in pairs]
    jobs = Text(tokenizer, False).jobs(
        [(p.prompt, text) for p in found for text in (p.chosen, p.rejected)]
    )
    rows = [[*job.context, *job.targets][-max_length:] for job in jobs]
    return [
        {"rows": rows[at : at + 2], "tokens": [len(job.targets) for job in jobs[at : at + 2]]}
        for at in range(0, len(rows), 2)
    ]


def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: all chosen rows, then all rejected ones."""
    sides = (0, 1)
    return {
        "rows": [example["rows"][side] for side in sides for example in examples],
        "tokens": torch.tensor([e["tokens"][side] for side in sides for e in examples]),
    }
