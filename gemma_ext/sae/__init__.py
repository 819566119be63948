"""Sparse dictionaries trained, measured and looked into: `gemma-ext sae`.

    opened = open_model("pocket")
    sae = new_dictionary(width_of(opened.model, 1), 2048, "topk", 32)
    done = train_dictionary(opened, "1", sae, TrainConfig(steps=500), "out/sae")

The modules are in `gemma_ext.nn.sparse_autoencoder`, formats in `gemma_ext.integrations.sae_files`.
"""

from gemma_ext.sae.config import TrainConfig
from gemma_ext.sae.contexts import Context, Latent, inspect_latents
from gemma_ext.sae.evaluation import Evaluation, evaluate
from gemma_ext.sae.opening import Opened, load_model, open_model, pocket_of, width_of
from gemma_ext.sae.run import Trained, train_dictionary
from gemma_ext.sae.sites import Site, capture, find_site, replacing
from gemma_ext.sae.stream import Activations
from gemma_ext.sae.tokens import pack, read_texts
from gemma_ext.sae.trainer import Trainer
from gemma_ext.sae.tuning import tuned_model
from gemma_ext.sae.variants import new_dictionary

__all__ = [
    "Activations",
    "Context",
    "Evaluation",
    "Latent",
    "Opened",
    "Site",
    "TrainConfig",
    "Trained",
    "Trainer",
    "capture",
    "evaluate",
    "find_site",
    "inspect_latents",
    "load_model",
    "new_dictionary",
    "open_model",
    "pack",
    "pocket_of",
    "read_texts",
    "replacing",
    "train_dictionary",
    "tuned_model",
    "width_of",
]
