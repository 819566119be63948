"""Scorers: a model in, scores in [0, 1] by task out.

`HeldOut` needs token streams only and serves the pocket; `LmEval` runs tasks of lm-eval through
`gemma_ext.lm` and serves real checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from gemma_ext.ops.cce import cce_rows
from gemma_ext.papers.mergebench.scores import turned


class Scorer(Protocol):
    """Scores of the domains on a side of the data, and of general tasks on the test side."""

    domains: Sequence[str]

    def score(
        self, model: nn.Module, side: str, domains: Sequence[str] | None = None
    ) -> dict[str, float]:
        """By domain (all by default), on side "validation" or "test"."""
        ...

    def general(self, model: nn.Module) -> dict[str, float]:
        """By general task: what the base can do and a merge may forget."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """Next-token prediction on held-out streams; no logits are held.

    Attributes:
        streams: by domain and side, [n] int64 ids.
        general_streams: by task, [n] int64 ids.
        context: tokens per window.
        metric: "accuracy" of the most probable token, or "likelihood", exp of minus the mean loss.
        batch: windows at once.
        begin: id before every window, what a model of its kind has before every text; None for
            none.
    """

    streams: Mapping[str, Mapping[str, Tensor]]
    general_streams: Mapping[str, Tensor]
    context: int
    metric: str = "accuracy"
    batch: int = 16
    begin: int | None = None

    def __post_init__(self) -> None:
        if self.metric not in ("accuracy", "likelihood"):
            raise ValueError(f"metric: expected accuracy or likelihood, got {self.metric!r}")

    @property
    def domains(self) -> list[str]:
        return list(self.streams)

    def score(
        self, model: nn.Module, side: str, domains: Sequence[str] | None = None
    ) -> dict[str, float]:
        return {
            name: self._one(model, self.streams[name][side]) for name in domains or self.domains
        }

    def general(self, model: nn.Module) -> dict[str, float]:
        return {name: self._one(model, ids) for name, ids in self.general_streams.items()}

    def _one(self, model: nn.Module, ids: Tensor) -> float:
        loss, accuracy = held_out(model, ids, self.context, self.batch, self.begin)
        return accuracy if self.metric == "accuracy" else math.exp(-loss)


@torch.no_grad()
def held_out(
    model: nn.Module, ids: Tensor, context: int, batch: int = 16, begin: int | None = None
) -> tuple[float, float]:
    """(mean loss in nats, accuracy) of a causal LM over the whole windows of a stream.

    Args:
        model: a transformers causal LM whose head is a projection.
        ids: [n] int64; n > context.
        begin: id before every window; the targets are the same with it and without.
    """
    if ids.numel() <= context:
        raise ValueError(f"ids: expected more than {context}, got {ids.numel()}")
    windows = ids.unfold(0, context + 1, context)
    head = model.get_output_embeddings()
    loss = hits = 0.0
    for part in windows.split(batch):
        part = part.to(head.weight.device)
        inputs = part[:, :-1] if begin is None else preceded(part[:, :-1], begin)
        hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        rows = cce_rows(
            hidden[:, -context:].flatten(0, 1),
            head.weight,
            part[:, 1:].flatten(),
            head.bias,
            softcap=getattr(model.config, "final_logit_softcapping", None),
            want_argmax=True,
        )
        loss += float(rows.nll.double().sum())
        hits += float((rows.argmax == part[:, 1:].flatten()).sum())
    targets = windows.shape[0] * context
    return loss / targets, hits / targets


def preceded(rows: Tensor, begin: int) -> Tensor:
    """[B, T] ids with one more in front, [B, T + 1]."""
    return torch.cat([rows.new_full((len(rows), 1), begin), rows], dim=1)


@dataclass(frozen=True)
class LmEval:
    """Tasks of lm-eval, run by `gemma_ext.lm`.

    Attributes:
        tokenizer: of every model that is scored.
        tasks: by domain, then side, names of lm-eval tasks with the metric that counts, as
            {"math": {"test": {"gsm8k_cot": "exact_match,strict-match"}, "validation": {...}}}.
        general_tasks: by name, the metric.
        falling: metrics of rates that should fall.
        limit: examples per task, None for all.
        options: further arguments of `lm_eval.simple_evaluate` (task_manager, num_fewshot, ...).
    """

    tokenizer: object
    tasks: Mapping[str, Mapping[str, Mapping[str, str]]]
    general_tasks: Mapping[str, str]
    falling: frozenset[str] = frozenset()
    limit: int | None = None
    options: Mapping[str, object] | None = None

    @property
    def domains(self) -> list[str]:
        return list(self.tasks)

    def score(
        self, model: nn.Module, side: str, domains: Sequence[str] | None = None
    ) -> dict[str, float]:
        wanted = {domain: self.tasks[domain][side] for domain in domains or self.domains}
        found = self._run(model, {t: key for tasks in wanted.values() for t, key in tasks.items()})
        return {
            domain: math.fsum(found[task] for task in tasks) / len(tasks)
            for domain, tasks in wanted.items()
        }

    def general(self, model: nn.Module) -> dict[str, float]:
        return self._run(model, self.general_tasks)

    def _run(self, model: nn.Module, metrics: Mapping[str, str]) -> dict[str, float]:
        import lm_eval

        from gemma_ext.lm.harness import GemmaExtLM

        results = lm_eval.simple_evaluate(
            GemmaExtLM(model, tokenizer=self.tokenizer),
            tasks=list(metrics),
            limit=self.limit,
            **(self.options or {}),
        )["results"]
        found: dict[str, float] = {}
        for task, key in metrics.items():
            if key not in results[task]:
                raise ValueError(
                    f"tasks: expected {task} to report {key}, got {list(results[task])}"
                )
            value = float(results[task][key])
            found[task] = turned(value) if key in self.falling else value
        return found
