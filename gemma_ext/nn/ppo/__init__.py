"""Proximal policy optimisation: sequences, references, values and the tensor functions."""

from gemma_ext.nn.ppo.hidden import HiddenHead, read
from gemma_ext.nn.ppo.reference import AdapterOffReference, FrozenReference, Reference
from gemma_ext.nn.ppo.sequences import Sequences

__all__ = [
    "AdapterOffReference",
    "FrozenReference",
    "HiddenHead",
    "Reference",
    "Sequences",
    "read",
]
