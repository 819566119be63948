"""Relaxed Recursive Transformers: layer tying with low-rank matrices per depth (arXiv 2410.20672).

A pretrained decoder of L layers becomes one block of L / B layers that runs B times, plus small
matrices of each depth that begin as the truncated SVD of what tying took away; a short uptraining,
with the full-size model as teacher, repairs the rest.
"""

from gemma_ext.papers.recursive.conversion import convert
from gemma_ext.papers.recursive.initialise import INITS, stepwise_indices
from gemma_ext.papers.recursive.recipe import Recipe

__all__ = ["INITS", "Recipe", "convert", "stepwise_indices"]
