"""Training of a dictionary: resumes with the same bits, on one device or several ranks."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from gemma_ext import files
from gemma_ext.extras import require
from gemma_ext.nn.sparse_autoencoder import (
    DeadLatents,
    Loss,
    Objective,
    SparseAutoencoder,
    geometric_median,
)
from gemma_ext.nn.sparse_autoencoder.losses import variance
from gemma_ext.sae.config import TrainConfig
from gemma_ext.sae.stream import Activations

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
_MEDIAN_OF = 2048  # activations; Weiszfeld's iteration needs no more

Progress = Callable[[int, dict[str, float]], None]


class Trainer:
    """Trains a dictionary on a stream of activations.

    Whatever a step depends on is a function of the step's number or in the checkpoint, so a run
    that was interrupted gives the weights of one that was not.

    Args:
        sae: on its device, weights in float32; initialised from the data before the first step.
        objective: loss.
        stream: of activations; under torch.distributed, of this rank.
        config: schedule.
        out: folder of checkpoint and metrics.
        tensorboard: folder of its events; None for none.

    Raises:
        ValueError: an objective or a stream that does not fit, a checkpoint of another run.
        ImportError: tensorboard is missing.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        objective: Objective,
        stream: Activations,
        config: TrainConfig,
        out: str | Path,
        *,
        tensorboard: str | Path | None = None,
    ) -> None:
        objective.check(sae)
        if stream.sources != sae.sources:
            raise ValueError(f"stream: expected {sae.sources} sources, got {stream.sources}")
        self.sae, self.objective, self.stream, self.config = sae, objective, stream, config
        self.out = Path(out)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.dead = DeadLatents(sae.features, config.window(stream.batch * self.world))
        self.dead.to(sae.encoder.device)
        self.optimiser = torch.optim.Adam(
            sae.parameters(), lr=config.rate(sae.features), betas=config.betas, fused=True
        )
        self.k = getattr(sae.activation, "k", None)
        self.step = 0
        self._loss: nn.Module = _Loss(sae, objective)
        self._tensorboard = None if tensorboard is None else _tensorboard(tensorboard)

    def run(self, progress: Progress = lambda step, metrics: None) -> None:
        """All steps that are left.

        Args:
            progress: called behind every step with its number and the latest metrics.
        """
        if not self.resume():
            self.initialise()
        self._distribute()
        self.sae.train()
        metrics: dict[str, float] = {}
        lead = not dist.is_initialized() or dist.get_rank() == 0
        began, since = time.perf_counter(), self.step
        batches = self.stream.batches(self.step)
        while self.step < self.config.steps:
            loss, x = self.train_step(next(batches))
            last = self.step == self.config.steps
            if lead and (self.step % self.config.log_every == 0 or last):
                seconds = time.perf_counter() - began
                metrics = self.metrics(loss, x)
                metrics["tokens_per_second"] = (
                    (self.step - since) * self.stream.batch * self.world / seconds
                )
                self._write(metrics)
                began, since = time.perf_counter(), self.step
            if lead and (self.step % self.config.save_every == 0 or last):
                self.save()
            progress(self.step, metrics)
        self.sae.activation = self._with_k(self.k)
        self.sae.eval()

    def train_step(self, x: Tensor) -> tuple[Loss, Tensor]:
        """One step on activations x."""
        config, sae = self.config, self.sae
        x = x.to(sae.encoder.device)
        sae.activation = self._annealed()
        for group in self.optimiser.param_groups:
            group["lr"] = config.rate(sae.features) * config.factor(self.step)
        wants = self.objective.auxiliary or self.objective.pre_activation
        dead = self.dead.mask() if wants else None
        kind = x.device.type
        with torch.autocast(kind, torch.bfloat16) if config.bfloat16 else nullcontext():
            loss = self._loss(x.float(), dead, config.warmth(self.step))
        self.optimiser.zero_grad(set_to_none=True)
        loss.total.backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(sae.parameters(), config.clip)
        self.optimiser.step()
        sae.constrain()
        sae.observe(self._agreed(loss).latents)
        self.dead.update(loss.latents.codes)
        self.step += 1
        return loss, x

    @torch.no_grad()
    def initialise(self) -> None:
        """Scale of the input, and the decoder's bias at the median of the first activations."""
        sae = self.sae
        x = next(self.stream.batches())[:_MEDIAN_OF].to(sae.encoder.device).float()
        if sae.standardise_kind == "affine":
            rows = x if sae.sources > 1 else x[:, None]
            sae.input_factor.copy_(sae.width**0.5 / rows.norm(dim=-1).mean(0))
        if not sae.transcodes:
            z, _ = sae.standardised(x)
            sae.decoder_bias.copy_(geometric_median(z))

    def metrics(self, loss: Loss, x: Tensor) -> dict[str, float]:
        """Of the last step."""
        codes = loss.latents.codes
        z, _ = self.sae.standardised(x)
        values = {
            "loss": float(loss.total.detach()),
            "fvu": float(loss.squared.sum() / variance(z)),
            "l0": float((codes.values != 0).sum()) / max(1, loss.squared.numel()),
            "dead": float(self.dead.mask().float().mean()),
            "learning_rate": self.optimiser.param_groups[0]["lr"],
        }
        threshold = getattr(self.sae, "threshold", None)
        if threshold is not None:
            values["threshold"] = float(threshold.detach().mean())
        return values | {f"loss_{name}": float(value) for name, value in loss.terms.items()}

    def save(self) -> None:
        """Writes the checkpoint; the one before stays until it is whole."""
        state = {
            "step": self.step,
            "run": self._run(),
            "sae": self.sae.state_dict(),
            "dead": self.dead.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        files.write_pickle(self.out / CHECKPOINT, state)

    def resume(self) -> bool:
        """Takes up the checkpoint, if there is one."""
        place = self.out / CHECKPOINT
        if not place.exists():
            return False
        state = files.read_pickle(place)
        if state["run"] != self._run():
            differing = [k for k, v in self._run().items() if state["run"].get(k) != v]
            raise ValueError(
                f"out: {place} is of another run ({', '.join(differing)} differ); "
                "expected another folder or the same settings"
            )
        self.step = state["step"]
        self.sae.load_state_dict(state["sae"])
        self.dead.load_state_dict(state["dead"])
        self.optimiser.load_state_dict(state["optimiser"])
        lines = [line for line in self.history() if line["step"] <= self.step]
        files.write_text(self.out / METRICS, "".join(f"{json.dumps(line)}\n" for line in lines))
        return True

    def history(self) -> list[dict[str, float]]:
        """Lines of metrics so far."""
        return files.read_json_lines(self.out / METRICS)

    def _write(self, metrics: dict[str, float]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step} | metrics) + "\n")
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(f"sae/{name}", value, self.step)
            self._tensorboard.flush()

    def _run(self) -> dict[str, Any]:
        """What a resumed run has to share with the one before."""
        options = dataclasses.asdict(self.config)
        for name in ("log_every", "save_every"):
            del options[name]
        sae = self.sae
        return {
            "shape": [sae.width, sae.sources, sae.features],
            "activation": repr(self._with_k(self.k)),
            "objective": repr(self.objective),
            "config": json.dumps(options),
            "seed": self.stream.seed,
            "batch": self.stream.batch * self.world,
            "buffer": self.stream.buffer,
            "tokens": list(self.stream.tokens.shape),
        }

    def _annealed(self) -> Any:
        if self.config.k_from is None:
            return self.sae.activation
        part = self.config.warmth(self.step)
        return self._with_k(round(self.config.k_from + part * (self.k - self.config.k_from)))

    def _with_k(self, k: Any) -> Any:
        activation = self.sae.activation
        return activation if k is None else dataclasses.replace(activation, k=k)

    def _distribute(self) -> None:
        if self.world > 1:
            device = self.sae.encoder.device
            ids = [device.index] if device.type == "cuda" else None
            # AuxK and the pre-activation term come and go with the dead
            self._loss = nn.parallel.DistributedDataParallel(
                self._loss, device_ids=ids, find_unused_parameters=True
            )

    def _agreed(self, loss: Loss) -> Loss:
        """The smallest kept score is that of all ranks."""
        least = loss.latents.min_positive
        if self.world > 1 and least is not None:
            dist.all_reduce(least, dist.ReduceOp.MIN)
        return loss


class _Loss(nn.Module):
    """Objective as a module, for DDP to hook into."""

    def __init__(self, sae: SparseAutoencoder, objective: Objective) -> None:
        super().__init__()
        self.sae, self.objective = sae, objective

    def forward(self, x: Tensor, dead: Tensor | None, warmth: float) -> Loss:
        return self.objective(self.sae, x, dead=dead, warmth=warmth)


def _tensorboard(folder: str | Path) -> Any:
    require("live metrics", "sae", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
