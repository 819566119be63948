"""Efficient adversarial training of LLMs with continuous attacks (arXiv 2405.15589)."""

from gemma_ext.papers.continuous_at.embeddings import Embeddings
from gemma_ext.papers.continuous_at.prompts import Batch, Encoder, Row
from gemma_ext.papers.continuous_at.target_loss import TargetLoss

__all__ = ["Batch", "Embeddings", "Encoder", "Row", "TargetLoss"]
