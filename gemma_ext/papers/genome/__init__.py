"""Nature-Inspired Population-Based Evolution of Large Language Models (arXiv 2503.01155).

A pool of M experts of one base, some two hundred samples of a new task, no gradients: GENOME
crosses, mutates and selects; GENOME+ also moves individuals as a swarm and lets the fittest vote.

| in the paper and its release             | here                                               |
|-------------------------------------------|----------------------------------------------------|
| initialisation by pairs                   | `operators.initial`                                |
| crossover, weights f_i / (f_i + f_j)      | `operators.crossover`, `recipe.mix`, `applied`     |
| mutation, m ~ Bernoulli, e ~ N(0, s^2)    | `operators.mutation`, `recipe.with_noise`          |
| succession, v <- (..) / C, x <- x + l v   | `operators.succession`, `operators.stepped`        |
| selection                                 | `population.select`                                |
| fitness, sum_t w_t score_t                | `evaluation.Ledger`, `tasks.score`                 |
| GENOME, GENOME+                           | `evolve`, `PRESETS`                                |
| ensemble                                  | `ensemble.majority`, `ensemble.centre`             |
| LoraHub, Model Swarms, static merges      | `BASELINES`                                        |

What differs from the release:
- An individual is a recipe over the pool with seeds, never a copy of weights. Linear crossover,
  mutation and succession are algebra on its coefficients, so that a child of any depth is written
  into one resident set of tensors by one weighted sum, in float32 and rounded once, and a noise per
  mutated ancestor. A recipe that grows longer than `Search.longest` is re-based on a stored copy.
- Every decision is a pure function of (seed, generation, stage, who) and of fitness: one seed is
  one lineage, for any number of workers, and after any kill.
- The release's defects are repaired; `DEFECTS` names them, `compat="genome"` brings them back.
- A and B of LoRA are averaged apart, as there; the crossover "product" averages B A itself.

Defaults are the release's (`PRESETS`); which of its four columns the paper used is not known.
"""

from gemma_ext.papers.genome.baselines import BASELINES
from gemma_ext.papers.genome.config import COMPAT, DEFECTS, PRESETS, Search, search_from
from gemma_ext.papers.genome.ensemble import centre, majority
from gemma_ext.papers.genome.evaluation import Account, Evaluator, Job, Ledger, Outcome
from gemma_ext.papers.genome.lineage import Workspace
from gemma_ext.papers.genome.materialise import RULES, Materialiser
from gemma_ext.papers.genome.pool import Pool, load_adapters, load_checkpoints
from gemma_ext.papers.genome.recipe import Genome, Noise, applied, expert, mix, with_noise
from gemma_ext.papers.genome.search import Evolved, evolve
from gemma_ext.papers.genome.study import run_study

__all__ = [
    "BASELINES",
    "COMPAT",
    "DEFECTS",
    "PRESETS",
    "RULES",
    "Account",
    "Evaluator",
    "Evolved",
    "Genome",
    "Job",
    "Ledger",
    "Materialiser",
    "Noise",
    "Outcome",
    "Pool",
    "Search",
    "Workspace",
    "applied",
    "centre",
    "evolve",
    "expert",
    "load_adapters",
    "load_checkpoints",
    "majority",
    "mix",
    "run_study",
    "search_from",
    "with_noise",
]
