"""Overcoming Sparsity Artifacts in Crosscoders to Interpret Chat-Tuning (arXiv 2504.02922).

A crosscoder is one sparse dictionary over the activations of two models at the same tokens: a
latent has one code and two decoders. Latents whose base decoder vanishes look like what the chat
model added; under an L1 penalty many of them are not.

| in the paper                                                | here                               |
|-------------------------------------------------------------|------------------------------------|
| crosscoder, codes weighed by w_j = sum_m norm(d_j^m)        | `nn.sparse_autoencoder`, 2 sources |
| L1 and BatchTopK training, AuxK, threshold                  | `Recipe`, `train`                  |
| relative norm difference Delta and its tags                 | `difference`, `tags`               |
| Latent Scaling: beta and nu of error and reconstruction     | `LatentScaling`, `Betas`           |
| chat specific: nu_error < 0.2 and nu_reconstruction < 0.5   | `Betas.specific`                   |
| causal test: KL of patched states over replies              | `causal_test`                      |
| complete shrinkage, latent decoupling                       | `planted`                          |

Read from the released code and a summary of the paper; its headline numbers are second-hand and
are not repeated here. What differs:
- Latent Scaling is of all latents in one pass, where the release materialises [J, N, D] for 3176.
- No [N, F] tensor exists; the encoder of both models is one product.
- The released error term is the unsquared norm, mean over models; the paper's is half the squared
  one. Both are there (`Recipe.error`); mu of the one means nothing for the other.
- The release's default k_max trains at k = 2048; here k is k, annealed only where asked for.
- Beside it: a null diff (a model against itself), random directions, seeds with intervals.
- Not here: DECOUPLED codes. A latent then has a code for each model, and may be one model's alone
  with equal decoders: Delta and nu, which compare two decoders of one code, say nothing of it.
"""

from gemma_ext.papers.crosscoder.causal import Divergence, Replies, causal_test, patched_state
from gemma_ext.papers.crosscoder.discovery import Discovery, discover, random_directions
from gemma_ext.papers.crosscoder.norms import TAGS, difference, tags
from gemma_ext.papers.crosscoder.pairs import paired_states
from gemma_ext.papers.crosscoder.scaling import Betas, LatentScaling
from gemma_ext.papers.crosscoder.training import Recipe, Trained, train

__all__ = [
    "TAGS",
    "Betas",
    "Discovery",
    "Divergence",
    "LatentScaling",
    "Recipe",
    "Replies",
    "Trained",
    "causal_test",
    "difference",
    "discover",
    "paired_states",
    "patched_state",
    "random_directions",
    "tags",
    "train",
]
