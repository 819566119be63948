"""The default worker: a model of `transformers`, one resident set of weights, tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.extras import require
from gemma_ext.papers.genome.evaluation import Evaluator, Outcome
from gemma_ext.papers.genome.materialise import Materialiser
from gemma_ext.papers.genome.pool import Pool, load_adapters, load_checkpoints
from gemma_ext.papers.genome.tasks import Task, score


@dataclass(frozen=True)
class Experts:
    """Where the pool is: LoRA adapters on one model, or whole checkpoints.

    Attributes:
        model: folder or hub id that adapters sit on; of checkpoints, the base of their deltas or
            None.
        adapters, checkpoints: folders of the experts; one of the two.

    Raises:
        ValueError: both or neither, or adapters without a model.
    """

    model: str | None = None
    adapters: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.adapters) == bool(self.checkpoints):
            raise ValueError(
                "experts: expected either adapters or checkpoints, got both or neither"
            )
        if self.adapters and self.model is None:
            raise ValueError("model: expected the model that the adapters are of, got none")

    def pool(self) -> Pool:
        if self.adapters:
            return load_adapters(self.adapters)
        return load_checkpoints(self.checkpoints, self.model)

    def __len__(self) -> int:
        return len(self.adapters) + len(self.checkpoints)


@dataclass(frozen=True)
class ModelWorker:
    """Makes an `Evaluator`; pickles, so that each worker loads its own model.

    Attributes:
        experts: the pool.
        tasks: what is scored.
        folder: of finished genomes.
        device: "cpu", "cuda", ...
        dtype: of the model's weights, "auto" for as stored.
        options: of `gemma_ext.lm.HuggingFaceModel`.
    """

    experts: Experts
    tasks: tuple[Task, ...]
    folder: Path | None = None
    device: str = "cpu"
    dtype: str = "auto"
    options: Mapping[str, Any] | None = None

    def __call__(self) -> Evaluator:
        from gemma_ext.lm import HuggingFaceModel

        pool = self.experts.pool()
        if self.device != "cpu":
            pool = pool.to(self.device)
        model, tokenizer, tensors = self._model(pool)
        # no cache: every individual is another model
        options = {"show_progress": False, **(self.options or {})}
        lm = HuggingFaceModel(model, tokenizer, **options)

        def scored(split: str) -> Outcome:
            return score(lm, self.tasks, split)

        return Evaluator(Materialiser(pool, self.folder), tensors, scored)

    def _model(self, pool: Pool) -> tuple[Any, Any, Mapping[str, Tensor]]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = self.experts.model if self.experts.adapters else self.experts.checkpoints[0]
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(self.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
        if self.experts.checkpoints:
            return model, tokenizer, dict(model.named_parameters(remove_duplicate=False))
        with_adapter, tensors = resident_adapter(model, self.experts.adapters[0])
        return with_adapter, tokenizer, tensors


def resident_adapter(model: Any, folder: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """The model with a PEFT adapter in it, and the adapter's tensors under their names in files.

    Raises:
        ImportError: peft is missing.
    """
    require("a LoRA expert", "genome", "peft")
    from peft import PeftModel

    peft = PeftModel.from_pretrained(model, folder)
    named = peft.named_parameters(remove_duplicate=False)
    tensors = {name.replace(".default", ""): p.data for name, p in named if ".default" in name}
    return peft.base_model.model.eval(), tensors
