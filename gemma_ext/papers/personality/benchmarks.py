"""Tasks of lm-eval as benchmarks of the study, item by item.

The paper runs MMLU (350 items of seven subjects), GAIA and BBQ; here any task of lm-eval is one
benchmark, asked through the manipulation's own way of asking. Of BBQ an item scores 1 for a biased
answer, -1 for the opposite and 0 for UNKNOWN, since then its mean is the score of its authors:

    s_AMB = (1 - accuracy)(2 biased / named - 1) = (biased - anti-biased) / items
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gemma_ext.extras import require
from gemma_ext.lm import HuggingFaceModel
from gemma_ext.papers.personality.states import Ask

require("benchmarks of lm-eval", "lm", "lm_eval", "transformers", "accelerate")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from gemma_ext.lm.harness import GemmaExtLM  # noqa: E402

Sample = Mapping[str, Any]
"""What lm-eval logs of an item."""
Read = Callable[[Sample], float | None]
"""The score of an item; None leaves it out."""


def metric(name: str) -> Read:
    """The item's value of a metric.

    Raises (when it reads):
        ValueError: the task has no such metric, or none of one number an item.
    """

    def read(sample: Sample) -> float:
        value = sample.get(name)
        if name not in sample["metrics"] or not isinstance(value, int | float):
            raise ValueError(f"metric: expected one of {sample['metrics']}, got {name!r}")
        return float(value)

    return read


def bbq_ambiguous(sample: Sample) -> float | None:
    """-1, 0 or 1 of an ambiguous item of lm-eval's `bbq`; their mean is s_AMB."""
    _, biased, named, disambiguated = sample["amb_bias_score"]
    return None if disambiguated else float(2 * biased - named)


@dataclass(frozen=True)
class LmEvalBenchmark:
    """A `Benchmark` of one task or group of lm-eval.

    Attributes:
        task: its name, such as "mmlu_abstract_algebra" or "bbq".
        read: what an item scores.
        filter: of lm-eval, where a task has several.
        limit: of items of each task, None for all.
        options: further arguments of `lm_eval.simple_evaluate` (task_manager, num_fewshot, ...).

    Raises (when it is called):
        ValueError: no item of that filter, or none that `read` scores.
    """

    task: str
    read: Read = field(default_factory=lambda: metric("acc"))
    filter: str = "none"
    limit: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, lm: HuggingFaceModel, ask: Ask) -> list[float]:
        found = simple_evaluate(
            _Asked(lm, ask),
            tasks=[self.task],
            limit=self.limit,
            log_samples=True,
            bootstrap_iters=0,
            **self.options,
        )["samples"]
        scores = []
        for task in sorted(found):
            items = [sample for sample in found[task] if sample["filter"] == self.filter]
            scores += map(self.read, sorted(items, key=lambda sample: sample["doc_id"]))
        scores = [score for score in scores if score is not None]
        if not scores:
            raise ValueError(f"{self.task}: expected items of filter {self.filter!r}, got none")
        return scores


class _Asked(GemmaExtLM):
    """lm-eval's contexts, each as the manipulation asks a question."""

    def __init__(self, lm: HuggingFaceModel, ask: Ask) -> None:
        super().__init__(
            lm.model,
            tokenizer=lm.text.tokenizer,
            max_length=lm.max_length,
            impl=lm.impl,
            show_progress=lm.show_progress,
        )
        self.ask = ask

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(self._asked(requests), disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return super().generate_until(self._asked(requests), disable_tqdm)

    def _asked(self, requests: list[Instance]) -> list[Instance]:
        return [
            replace(r, arguments=(self.lm.text.render(self.ask(r.args[0])), *r.args[1:]))
            for r in requests
        ]
