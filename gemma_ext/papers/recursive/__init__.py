"""Relaxed Recursive Transformers: layer tying with low-rank matrices per depth (arXiv 2410.20672).

A pretrained decoder of L layers becomes one block of L / B layers that runs B times, plus small
matrices of each depth that begin as the truncated SVD of what tying took away; a short uptraining,
with the full-size model as teacher, repairs the rest.

| in the paper                                                | here                              |
|-------------------------------------------------------------|-----------------------------------|
| CYCLE and SEQUENCE order, everything tied, norms included   | `nn.recursive.Plan`               |
| y = W' x + B_l (A_l x), no scale, rank cut to the matrix    | `nn.recursive.DepthLinear`        |
| Stepwise, Average, Lower; Upper and Random of the code      | `Recipe.init`, `stepwise_indices` |
| A = V_r', B = U_r S_r of W_l - W'; zero residual: LoRA's    | `factors.of_depths`               |
| prefix of P vectors of the model's width at each depth      | `nn.recursive.add_prefixes`       |
| forward and reverse KL, JSD, TVD from the full-size model   | `Objective.divergence`            |
| weighted, aggressive, self-distilled, frozen exit training  | `Objective.exits`                 |
| AdamW 2e-4, cosine, warm-up                                 | `trainer.arguments`               |

What differs:
- The appendix has the whole first loop of Stepwise begin at zero; by the formula, which is
  implemented, that is so under Lower, and of Stepwise's L = 6 it is depths 1 and 6.
- Residuals are taken from the stored weight as it was rounded.
- Middle-cycle (first and last layer not shared) is of the authors' later code; it keeps Gemma 2's
  alternation of windows, which an odd block does not. The type of attention belongs to the depth.
- Alternating refinement, a first loop without matrices: not in the paper.
- Weights of distillation, temperature, and where exits are normalised are not said in the paper;
  exits share the final norm here.
"""

from gemma_ext.papers.recursive.conversion import convert
from gemma_ext.papers.recursive.export import export_folder
from gemma_ext.papers.recursive.initialise import INITS, stepwise_indices
from gemma_ext.papers.recursive.objective import EXITS, Objective
from gemma_ext.papers.recursive.recipe import Recipe
from gemma_ext.papers.recursive.streaming import convert_folder, count_pieces

__all__ = [
    "EXITS",
    "INITS",
    "Objective",
    "Recipe",
    "convert",
    "convert_folder",
    "count_pieces",
    "export_folder",
    "stepwise_indices",
]
