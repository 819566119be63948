"""Attacks that a model was not trained against, and what robustness costs.

| attack                                 | here                                             |
|----------------------------------------|--------------------------------------------------|
| greedy coordinate gradient             | `gcg.run`, a drop-in for nanoGCG                 |
| embeddings, many steps and restarts    | `embedding.audit`, `embedding.stronger`          |
| unconstrained suffix embeddings        | `embedding.suffix`, `embedding.SUFFIX`           |
| prefilling                             | `prefilling.prefill`                             |
| PAIR                                   | `pair.pair`                                      |
| genetic search over prompts (AutoDAN)  | `autodan.search`                                 |

`harmbench` reads and writes HarmBench's files, `runs` goes from behaviours to labelled completions,
`over_refusal` counts harmless requests that are refused, `xstest` reads and writes XSTest's files,
`page` draws it all. `scorer.TargetScorer` is the loss that the discrete attacks share.
"""

from gemma_ext.papers.continuous_at.evaluation import (
    autodan,
    embedding,
    gcg,
    harmbench,
    judges,
    over_refusal,
    page,
    pair,
    prefilling,
    runs,
    xstest,
)
from gemma_ext.papers.continuous_at.evaluation.scorer import Scores, TargetScorer
from gemma_ext.papers.continuous_at.evaluation.template import Parts, split

__all__ = [
    "Parts",
    "Scores",
    "TargetScorer",
    "autodan",
    "embedding",
    "gcg",
    "harmbench",
    "judges",
    "over_refusal",
    "page",
    "pair",
    "prefilling",
    "runs",
    "split",
    "xstest",
]
