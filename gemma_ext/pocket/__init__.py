"""A real Gemma-2 small enough for a laptop: real text, trained, cached and verified.

    pocket = gemma_ext.pocket.load("nano")
    pocket.model, pocket.tokenizer, pocket.train_ids, pocket.heldout_ids, pocket.report

| size  | V     | D   | layers | context | made in              |
|-------|-------|-----|--------|---------|----------------------|
| nano  | 2048  | 128 | 4      | 128     | under a minute       |
| small | 16384 | 192 | 4      | 256     | minutes              |

Its held-out perplexity is below that of an interpolated bigram model counted on the same tokens;
the report has both.
"""

from gemma_ext.pocket.bigram import bigram_perplexity
from gemma_ext.pocket.cache import cache_dir
from gemma_ext.pocket.corpus import Document, documents
from gemma_ext.pocket.domains import DOMAINS, DomainText, load_domain
from gemma_ext.pocket.experts import ExpertRecipe, expert_folder, load_expert
from gemma_ext.pocket.model import SIZES, PocketSize, build_config, build_model
from gemma_ext.pocket.store import Pocket, Text, load, load_text
from gemma_ext.pocket.training import perplexity

__all__ = [
    "DOMAINS",
    "SIZES",
    "Document",
    "DomainText",
    "ExpertRecipe",
    "Pocket",
    "PocketSize",
    "Text",
    "bigram_perplexity",
    "build_config",
    "build_model",
    "cache_dir",
    "documents",
    "expert_folder",
    "load",
    "load_domain",
    "load_expert",
    "load_text",
    "perplexity",
]
