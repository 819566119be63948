"""Breaking Bad Tokens: detoxification of language models by sparse autoencoders (arXiv 2505.14536).

| in the paper                                          | here                                    |
|-------------------------------------------------------|-----------------------------------------|
| latents that fire on toxic text                       | `LatentContrast`, `causal_pick`         |
| three tiers of steering: always, where the input      | `Intervention` with tier constant,      |
| fires, where the token fires                          | per_input, per_token                    |
| strengths                                             | `sweep`                                 |
| toxicity, fluency, capability                         | `Row`; `Lexicon`, `Detoxify`, any scorer |
| feature splitting over dictionary widths              | `splitting`                             |

Of the paper only the abstract could be read: there are three tiers; toxicity falls by up to a fifth
against baselines at stronger strengths; fluency suffers on GPT-2 Small and less on Gemma-2-2B;
benchmarks stay stable; wide dictionaries split features. Not verified, and therefore choices made
here that are arguments everywhere:
- the text that latents are sought on, their score (difference of pooled activations, Welch's t),
  the filter (latents that fire on more than 10 % of clean tokens), the pick by a causal test;
- the scale of the strength (the largest activation seen) and the grid, which is a follow-up's;
- what "the input fires" means while text is generated: `input_scope`;
- prompts, counts and sampling: the field's, not the paper's.

What differs: the state is never replaced by the dictionary's reconstruction, so strength 0 is the
model bit for bit and no reconstruction error is charged to steering; <bos> opens no gate; blocks
below the steered one run once for all strengths.
"""

from gemma_ext.papers.detox.intervention import TIERS, Intervention, Latent, latents
from gemma_ext.papers.detox.metrics import Toxicity, distinct, repetition, toxicity
from gemma_ext.papers.detox.prompts import ToxicityPrompt, read_prompts
from gemma_ext.papers.detox.scorers import Detoxify, Lexicon, Scorer
from gemma_ext.papers.detox.search import Found, LatentContrast
from gemma_ext.papers.detox.splitting import Split, splitting
from gemma_ext.papers.detox.study import (
    ALPHAS,
    Row,
    Task,
    causal_pick,
    contrast,
    contrasts,
    sweep,
)

__all__ = [
    "ALPHAS",
    "TIERS",
    "Detoxify",
    "Found",
    "Intervention",
    "Latent",
    "LatentContrast",
    "Lexicon",
    "Row",
    "Scorer",
    "Split",
    "Task",
    "Toxicity",
    "ToxicityPrompt",
    "causal_pick",
    "contrast",
    "contrasts",
    "distinct",
    "latents",
    "read_prompts",
    "repetition",
    "splitting",
    "sweep",
    "toxicity",
]
