"""Towards Atoms of Large Language Models (arXiv 2509.20784; a later version is at ICML 2026).

Hidden states m = D delta are K-sparse over atoms d_i that are nearly orthogonal under the atomic
inner product <u, v>_S = u' S v, S = (D D')^-1, estimated by the inverse second moment of states.

| in the paper                                            | here                                   |
|---------------------------------------------------------|----------------------------------------|
| atomic inner product and its estimator                  | `Moments`, `atomic_product`            |
| coherence mu, restricted isometry (1 +- (K - 1) mu)     | `coherence`, `isometry_defect`         |
| uniqueness mu < 1 / (2 K - 1)                           | `uniqueness_bound`                     |
| threshold-activated SAE: W_enc = D' S, z 1[z >= tau]    | `Dictionary`                           |
| its threshold and feasibility                           | `window`                               |
| trained form: JumpReLU, a threshold for each atom       | `learn`                                |
| faithfulness R^2, stability q*                          | `evaluate`, `stability`                |
| states x dictionary size                                | `study.scaling`                        |

The text and the code of the paper could not be read; what is here is rebuilt from its abstract,
reviews and summaries. Unverified: what q* runs over (here pairs i < j and tokens), whether R^2 is
about the mean (here both), all settings of the training, and whether the vectors k of the estimator
are hidden states (here they are).

What differs:
- The moment is centred unless asked for raw: codes are not negative, and their mean biases S.
- Encoder rows are divided by ||d_i||_S^2. D' S D is a projector of rank D, so that without it a
  code is read off as D / F of itself, and no window of the paper holds.
- Thresholding finds supports, not values: `Dictionary.refit` solves for them.
- Every figure stands beside a random dictionary of the same size under the same product, and beside
  the Welch bound: whitening makes any dictionary nearly orthogonal.
- `babel` certifies more than mu does: K-sparse codes are unique while mu_1(K) + mu_1(K - 1) < 1.
- R^2 is of states that were not learned from.
"""

from gemma_ext.papers.atoms.coherence import (
    Coherence,
    babel,
    coherence,
    exact_quantile,
    isometry_defect,
    unique_up_to,
    welch,
)
from gemma_ext.papers.atoms.controls import at_density, principal_axes, random_dictionary
from gemma_ext.papers.atoms.dictionary import Dictionary, load
from gemma_ext.papers.atoms.evaluation import Quality, evaluate, recovery
from gemma_ext.papers.atoms.learning import Learned, Recipe, learn
from gemma_ext.papers.atoms.moments import Moments, load_mom2
from gemma_ext.papers.atoms.product import AtomicProduct, atomic_product, product_of
from gemma_ext.papers.atoms.windows import Window, stability, uniqueness_bound, window

__all__ = [
    "AtomicProduct",
    "Coherence",
    "Dictionary",
    "Learned",
    "Moments",
    "Quality",
    "Recipe",
    "Window",
    "at_density",
    "atomic_product",
    "babel",
    "coherence",
    "evaluate",
    "exact_quantile",
    "isometry_defect",
    "learn",
    "load",
    "load_mom2",
    "principal_axes",
    "product_of",
    "random_dictionary",
    "recovery",
    "stability",
    "unique_up_to",
    "uniqueness_bound",
    "welch",
    "window",
]
