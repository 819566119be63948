"""Modules built on the ops.

| module | |
|---|---|
| `LinearCrossEntropy`, `distillation_loss` | losses without logits |
| `sparse_autoencoder` | sparse dictionaries and crosscoders |
| `steering` | latents held up or down in a running model |
| `recursive` | decoders that run a block of layers several times |
| `ppo` | sequences, advantages, losses, critics and references |
"""

from gemma_ext.nn.linear_cross_entropy import LinearCrossEntropy
from gemma_ext.nn.linear_divergence import distillation_loss

__all__ = ["LinearCrossEntropy", "distillation_loss"]
