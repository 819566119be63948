"""MergeBench: merging domain-specialised language models (arXiv 2505.10833, NeurIPS 2025).

| in the paper                                         | here                                     |
|------------------------------------------------------|------------------------------------------|
| expert of each of five domains of one base           | `Pool`                                   |
| nine merging algorithms and what they are tuned over | `algorithms()`, methods of               |
|                                                      | `gemma_ext.souping`                      |
| normalised performance, score / expert's score       | `scores.normalised`, `Outcome`           |
| forgetting, general tasks over the base's score      | `Outcome.retained`                       |
| run time: merging, and validation of every           | `Outcome.merge_seconds`,                 |
| configuration that was tried                         | `Outcome.validate_seconds`               |
| lm-eval tasks                                        | `LmEval`; held-out text: `HeldOut`       |

What differs:
- A configuration is merged into one resident model; nothing is written and nothing is loaded.
- Where the released code computes something else than the method, `algorithms(released=True)` runs
  it beside the method (`as_released`).
- Embeddings and a head stay the base's, as in the released code, unless `Pool.embeddings`.
- Everything random has a seed, and tables carry intervals over seeds.
- The grids are ours: the paper's are not published.
"""

from gemma_ext.papers.mergebench.merging import algorithms
from gemma_ext.papers.mergebench.page import markdown, rows, write
from gemma_ext.papers.mergebench.protocol import Algorithm, Outcome, Pool, run
from gemma_ext.papers.mergebench.scorers import HeldOut, LmEval, Scorer

__all__ = [
    "Algorithm",
    "HeldOut",
    "LmEval",
    "Outcome",
    "Pool",
    "Scorer",
    "algorithms",
    "markdown",
    "rows",
    "run",
    "write",
]
