"""The paper's tables in kind: a small model, converted, uptrained, trained for exits, measured.

Each function trains one model from a plain description and gives a record: held-out nats per token
of every loop's exit, and parameters outside the embedding.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.nn.recursive import Plan, decoder_layers, exit_heads, load, save
from gemma_ext.ops.cce import linear_cross_entropy
from gemma_ext.papers.recursive.conversion import convert
from gemma_ext.papers.recursive.initialise import stepwise_indices
from gemma_ext.papers.recursive.objective import Objective
from gemma_ext.papers.recursive.recipe import Recipe
from gemma_ext.papers.recursive.text import examples
from gemma_ext.papers.recursive.trainer import Bar, RecursiveTrainer, arguments

Record = dict[str, Any]
Advance = Callable[..., None]
CE = Objective(divergence_weight=0.0)


@dataclass(frozen=True)
class Bench:
    """What every run of a study has in common.

    Attributes:
        model: the full-size one, in evaluation mode.
        train: [W, T] windows; held_out: [W', T].
        steps: of uptraining; exit_steps: of exit training.
        batch: windows of a step.
        rate: peak of the learning rate.
        device: "cpu" or "cuda".
        freeze_embedding: leaves it and the head as they are.
    """

    model: Any
    train: Tensor
    held_out: Tensor
    steps: int = 100
    exit_steps: int = 60
    batch: int = 16
    rate: float = 1e-3
    device: str = "cpu"
    freeze_embedding: bool = False

    def fit(
        self,
        model: Any,
        seed: int,
        objective: Objective = CE,
        *,
        teacher: bool = False,
        steps: int | None = None,
        rate: float | None = None,
        advance: Advance = lambda count, note="": None,
    ) -> Any:
        """Trains a model in place on windows whose order is the seed's."""
        steps = self.steps if steps is None else steps
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        windows = self.train[order[torch.arange(steps * self.batch) % len(order)]]
        if self.freeze_embedding:
            model.get_input_embeddings().requires_grad_(False)
            model.get_output_embeddings().requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            options = arguments(
                folder,
                steps,
                per_device_train_batch_size=self.batch,
                learning_rate=self.rate if rate is None else rate,
                save_strategy="no",
                logging_steps=5,
                disable_tqdm=True,
                use_cpu=self.device == "cpu",
                seed=seed,
            )
            RecursiveTrainer(
                model,
                options,
                train_dataset=examples(windows),
                objective=objective,
                teacher=self.model if teacher else None,
                callbacks=[Bar(advance)],
            ).train()
        return model.eval()

    def measure(self, model: Any) -> Record:
        """Nats of every loop's exit, the last one the model's own, and parameters."""
        return {"nats": self.nats(model), "parameters": non_embedding(model)}

    @torch.no_grad()
    def nats(self, model: Any, batch: int = 16) -> list[float]:
        """[B] held-out nats per token; an `ExitHead` reads for the early loops."""
        model.eval()
        totals = [0.0] * Plan.of_model(model).loops
        count = 0
        for rows in self.held_out.split(batch):
            rows = rows.to(model.device)
            heads = exit_heads(model, {"input_ids": rows})
            for number, head in enumerate(heads):
                if hasattr(model, "exit_head") and number + 1 < len(heads):
                    e, c = model.exit_head(head["e"], head["c"])
                    head = {**head, "e": e, "c": c}
                loss = linear_cross_entropy(**head, targets=rows, shift=True, reduction="sum")
                totals[number] += float(loss)
            count += rows.numel() - len(rows)
        return [total / count for total in totals]


def non_embedding(model: Any) -> int:
    """Parameters without the embedding and the head."""
    outside = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


def converted(
    bench: Bench,
    recipe: Recipe,
    seed: int,
    *,
    objective: Objective = CE,
    teacher: bool = False,
    keep: Path | None = None,
    advance: Advance = lambda count, note="": None,
) -> Record:
    """A conversion before and after uptraining.

    Args:
        keep: folder that the uptrained model is saved to, for `exits`.
    """
    model = convert(bench.model, dataclasses.replace(recipe, seed=seed))
    before = bench.measure(model)
    bench.fit(model, seed, objective, teacher=teacher, advance=advance)
    if keep is not None:
        shutil.rmtree(keep, ignore_errors=True)
        save(model, keep)
    return {"before": before["nats"], **bench.measure(model)}


def exits(
    bench: Bench,
    folder: Path,
    seed: int,
    objective: Objective,
    advance: Advance = lambda count, note="": None,
) -> Record:
    """An uptrained model before and after training for early exits, on windows drawn anew."""
    model = load(folder, device=bench.device)
    before = bench.measure(model)
    objective.prepare(model, min(128, model.config.get_text_config().hidden_size // 2))
    bench.fit(model, seed + 1000, objective, steps=bench.exit_steps, advance=advance)
    return {"before": before["nats"], **bench.measure(model)}


def vanilla(
    bench: Bench,
    seed: int,
    *,
    layers: Sequence[int] | None,
    loops: int,
    fresh: bool,
    advance: Advance = lambda count, note="": None,
) -> Record:
    """Controls, trained on the same tokens.

    Args:
        layers: those of the full-size model that are kept; None for all.
        loops: how often a random block is run; 1 for an ordinary model.
        fresh: random weights in place of pretrained ones, but for an embedding that is frozen.
    """
    model = _subset(bench.model, layers)
    if fresh:
        model = _fresh(model, seed, bench.freeze_embedding)
    if loops > 1:
        model = convert(model, Recipe(loops, "lower"))
    before = bench.measure(model)
    # from nothing 1e-2 was the best of 1e-3, 3e-3 and 1e-2 on the pocket, whose bench.rate is 1e-3
    bench.fit(model, seed, rate=10 * bench.rate if fresh else None, advance=advance)
    return {"before": before["nats"], **bench.measure(model)}


def half_depth(layers: int, loops: int) -> list[int]:
    """The layers of a pretrained model that is only cut."""
    return stepwise_indices(layers, layers // loops)


def perplexity(nats: float) -> float:
    return math.exp(min(nats, 50.0))


def _fresh(model: Any, seed: int, keep_embedding: bool) -> Any:
    """Random weights; the embedding and the head are kept where they are not going to learn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = type(model)(copy.deepcopy(model.config))
    if keep_embedding:
        made.get_input_embeddings().load_state_dict(model.get_input_embeddings().state_dict())
        made.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
    return made


def _subset(model: Any, kept: Sequence[int] | None) -> Any:
    """A copy with some of the layers, each in its new place."""
    model = copy.deepcopy(model)
    if kept is None:
        return model
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in kept]
    made = type(model)(config).to(model.dtype)
    name, layers = decoder_layers(model)
    state = {k: t for k, t in model.state_dict().items() if not k.startswith(f"{name}.")}
    for place, source in enumerate(kept):
        state |= {f"{name}.{place}.{k}": t for k, t in layers[source].state_dict().items()}
    made.load_state_dict(state)
    return made.eval()
