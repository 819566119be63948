"""Sparse dictionaries: modules, activations, losses (`gemma_ext.ops.sae` does the work).

sae = SparseAutoencoder(2304, 16384, TopK(64), unit_norm=True)
loss = default_objective(sae)(sae, x)
loss.total.backward()
"""

from gemma_ext.nn.sparse_autoencoder.activations import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    Latents,
    ReLU,
    TopK,
)
from gemma_ext.nn.sparse_autoencoder.dead import DeadLatents
from gemma_ext.nn.sparse_autoencoder.fold import (
    as_jumprelu,
    fold_centre,
    fold_norms,
    fold_standardise,
    fold_whitening,
)
from gemma_ext.nn.sparse_autoencoder.jump import jump, step
from gemma_ext.nn.sparse_autoencoder.median import geometric_median
from gemma_ext.nn.sparse_autoencoder.module import SparseAutoencoder
from gemma_ext.nn.sparse_autoencoder.objective import (
    Loss,
    Objective,
    default_objective,
)
from gemma_ext.nn.sparse_autoencoder.steering import latent_steering

__all__ = [
    "AbsTopK",
    "Activation",
    "BatchTopK",
    "DeadLatents",
    "Gated",
    "GroupMax",
    "JumpReLU",
    "Latents",
    "Loss",
    "Objective",
    "ReLU",
    "SparseAutoencoder",
    "TopK",
    "as_jumprelu",
    "default_objective",
    "fold_centre",
    "fold_norms",
    "fold_standardise",
    "fold_whitening",
    "geometric_median",
    "jump",
    "latent_steering",
    "step",
]
