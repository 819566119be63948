"""Adversarial training of a model's adapter (2.5): resumes with the same bits."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gemma_ext.extras import require
from gemma_ext.files import read_json_lines, read_pickle, replacing, write_pickle
from gemma_ext.papers.continuous_at.attack import Attack
from gemma_ext.papers.continuous_at.config import TrainConfig
from gemma_ext.papers.continuous_at.data import Mixture, Pair
from gemma_ext.papers.continuous_at.objective import Objective
from gemma_ext.papers.continuous_at.probes import attacked_loss
from gemma_ext.papers.continuous_at.references import References
from gemma_ext.progress import progress_bar

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CHECKPOINT, METRICS, REFERENCES = "checkpoint.pt", "metrics.jsonl", "references.json"

Probe = Callable[["PreTrainedModel"], float]


def with_lora(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """The model with adapters in all linear layers, the head left out; only they are trained.

    Raises:
        ImportError: peft is missing.
    """
    require("adversarial training", "ppo", "peft")
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return get_peft_model(model, lora)


class ContinuousTrainer:
    """Trains what of a model asks for gradients, on attacked prompts.

    A step is a function of its number, the weights and the optimiser's state, so a run that was
    interrupted gives the weights of one that was not. One process.

    Args:
        model: with an adapter (`with_lora`), or any with parameters to train.
        mixture: samples.
        config: of the run.
        out: folder of checkpoint, metrics and reference log-probabilities.
        heldout: pairs that are attacked for the metrics alone.
        probes: further numbers of a model, by name, taken with the held-out attack.
        heldout_attack: None for the attack of training.

    Raises:
        ValueError: nothing to train, useful samples in IPO; see `Attack`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mixture: Mixture,
        config: TrainConfig,
        out: str | Path,
        *,
        heldout: Sequence[Pair] = (),
        probes: Mapping[str, Probe] | None = None,
        heldout_attack: Attack | None = None,
    ) -> None:
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("model: expected parameters that ask for gradients, got none")
        self.model, self.mixture, self.config, self.out = model, mixture, config, Path(out)
        self.heldout, self.probes = tuple(heldout), dict(probes or {})
        self.attack = Attack(model, config.attack)
        self.heldout_attack = heldout_attack or self.attack
        base = _digest(model)
        self.references = References(self.out / REFERENCES, base) if config.loss == "ipo" else None
        self.objective = Objective(self.attack.perturbed, config, self.references)
        self.optimiser = torch.optim.AdamW(
            self.trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.step = 0
        self._run = {**config.identity(), "base": base, "data": _digest_of(mixture)}

    def run(self, *, show_progress: bool = True, stop_after: int | None = None) -> None:
        """All steps that are left.

        Args:
            stop_after: end the call after this many steps in all, as an interruption would.
        """
        if self.references is not None:
            rows = [row for pair in self.mixture.adversarial for row in (pair.safe, pair.harmful)]
            loss = self.attack.perturbed.loss
            # before weights that may have no adapter to switch off are those of the checkpoint
            self.references.compute(loss, rows, show_progress=show_progress)
        self.resume()
        last = min(stop_after or self.config.steps, self.config.steps)
        self.model.train()
        with progress_bar("hardening", self.config.steps, show_progress) as advance:
            advance(self.step)
            while self.step < last:
                began = time.perf_counter()
                metrics = self.train_step()
                metrics["seconds"] = time.perf_counter() - began
                done = self.step == self.config.steps
                if done or _due(self.step, self.config.evaluate_every):
                    metrics |= self.evaluate()
                if done or _due(self.step, self.config.log_every):
                    self._write(metrics)
                if done or self.step == last or _due(self.step, self.config.save_every):
                    self.save()
                advance(1, f"loss {metrics['loss']:.3f}")
        self.model.eval()

    def train_step(self) -> dict[str, float]:
        """One step of the optimiser; its metrics, all before cut-offs."""
        config = self.config
        pairs, utility = self.mixture.draw(self.step, config.batch)
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed * 1_000_003 + self.step)
            metrics: dict[str, float] = {"adversarial": len(pairs)}
            attacked = None
            if pairs:
                attacked = self.attack(
                    [pair.harmful for pair in pairs], evaluate=False, seed=self.step
                )
                metrics["boundary"] = sum(attacked.boundary) / len(attacked.boundary)
                metrics["attack_steps"] = float(attacked.steps.double().mean())
                if len(attacked.losses):
                    metrics["harmful_before"] = float(attacked.losses[0].mean())
            self.optimiser.zero_grad(set_to_none=True)
            metrics |= self.objective.backward(pairs, attacked, utility)
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate * config.factor(self.step)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), config.clip)
        self.optimiser.step()
        self.step += 1
        return metrics | {"gradient_norm": float(norm)}

    def evaluate(self) -> dict[str, float]:
        """Held-out attack and probes."""
        found = {}
        if self.heldout:
            losses = attacked_loss(self.heldout_attack, self.heldout)
            found = {f"heldout_{name}": value for name, value in losses.items()}
        return found | {name: probe(self.model) for name, probe in self.probes.items()}

    def save(self) -> None:
        """Writes the checkpoint; the one before stays until it is whole."""
        state = {
            "step": self.step,
            "run": json.dumps(self._run),
            "trained": {name: p.detach() for name, p in self.trained.items()},
            "optimiser": self.optimiser.state_dict(),
        }
        write_pickle(self.out / CHECKPOINT, state)

    def resume(self) -> bool:
        """Takes up the checkpoint, if there is one.

        Raises:
            ValueError: it is of another run.
        """
        place = self.out / CHECKPOINT
        if not place.exists():
            return False
        state = read_pickle(place)
        before, now = json.loads(state["run"]), json.loads(json.dumps(self._run))
        if before != now:
            differing = [k for k, v in now.items() if before.get(k) != v]
            raise ValueError(
                f"out: {place} is of another run ({', '.join(differing)} differ); "
                "expected another folder or the same settings"
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["trained"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        lines = [m for m in self.history() if m["step"] <= self.step]
        with replacing(self.out / METRICS) as beside:
            beside.write_text("".join(f"{json.dumps(m)}\n" for m in lines))
        return True

    def history(self) -> list[dict[str, float]]:
        """Lines of metrics so far."""
        return read_json_lines(self.out / METRICS)

    def _write(self, metrics: Mapping[str, float]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step} | dict(metrics)) + "\n")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _digest(model: nn.Module) -> str:
    """Of the weights before training: those of an adapter, which can be switched off, left out."""
    found = hashlib.blake2b(digest_size=16)
    whole = not hasattr(model, "disable_adapter")
    for name, p in sorted(model.named_parameters()):
        if whole or not p.requires_grad:
            found.update(name.encode())
            found.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _digest_of(mixture: Mixture) -> str:
    text = repr((mixture.adversarial, mixture.utility, mixture.p, mixture.seed))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
