"""Personality as a probe for the evaluation of language models (arXiv 2509.04794).

| in the paper                                     | here                                         |
|--------------------------------------------------|----------------------------------------------|
| contrastive Big-Five answers                     | `contrast.Pair`, `from_answers`              |
| in context, PEFT, mechanistic steering           | `in_context`, `train_adapter`, `steered`     |
| mean-difference vectors at four layers           | `trait_directions`                           |
| strength by a search with a gate for gibberish   | `calibration.grid`, `best`, `by_thirds`      |
| trait purification                               | `directions.without`, `contrasted`           |
| within-run delta of MMLU, GAIA, BBQ              | `answers`, `effects`                         |
| stability at three levels                        | `stability.levels`                           |
| all of it in one run                             | `Comparison`                                 |

From the release's code; of the paper itself the abstract: in context aligns strongly at little
cost, adapters align most and damage most, steering is light and competitive, openness is hard and
agreeableness resists examples. Its numbers are not verified; the stability values that are quoted
second-hand cannot come from the released formula (`stability`).

What differs:
- Sites are named by what they mean: the module the release hooks writes to the residual stream in
  Gemma-2 and not in Llama.
- A text has one <bos>, states are read at the answer's own last token, and pairs of one author and
  of like length are what directions are made of (`length_matched`).
- Strengths are calibrated on an even grid in one batch, on questions of their own.
- Every difference is paired over items, with intervals and Holm's adjustment; several samples of an
  item are averaged first.
- BBQ is scored as its authors define it.
- The adapter's base is not quantised, so that quantisation is not charged to the trait.
"""

from gemma_ext.papers.personality.calibration import Trial, best, best_layer, by_thirds, grid
from gemma_ext.papers.personality.comparison import Chosen, Comparison
from gemma_ext.papers.personality.contrast import (
    OPPOSITES,
    TRAITS,
    Pair,
    from_answers,
    length_matched,
    read_pairs,
    write_pairs,
)
from gemma_ext.papers.personality.directions import contrasted, crossed, without
from gemma_ext.papers.personality.manipulations import (
    AdapterRecipe,
    Manipulation,
    adapted,
    in_context,
    steered,
    train_adapter,
)
from gemma_ext.papers.personality.paired import Difference, difference, holm, mcnemar
from gemma_ext.papers.personality.stability import Stability, levels, ranges, stability
from gemma_ext.papers.personality.states import chat, last_states, trait_directions
from gemma_ext.papers.personality.study import (
    Answers,
    Effect,
    Judge,
    answers,
    effects,
    response,
    stability_rows,
    strength_trials,
)

__all__ = [
    "OPPOSITES",
    "TRAITS",
    "AdapterRecipe",
    "Answers",
    "Chosen",
    "Comparison",
    "Difference",
    "Effect",
    "Judge",
    "Manipulation",
    "Pair",
    "Stability",
    "Trial",
    "adapted",
    "answers",
    "best",
    "best_layer",
    "by_thirds",
    "chat",
    "contrasted",
    "crossed",
    "difference",
    "effects",
    "from_answers",
    "grid",
    "holm",
    "in_context",
    "last_states",
    "length_matched",
    "levels",
    "mcnemar",
    "ranges",
    "read_pairs",
    "response",
    "stability",
    "stability_rows",
    "steered",
    "strength_trials",
    "train_adapter",
    "trait_directions",
    "without",
    "write_pairs",
]
