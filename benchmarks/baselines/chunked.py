"""Token chunks with recomputation: one [N / 8, V] block of logits at a time, in both passes.

The recipe of torchtune's linear cross-entropy (8 chunks of tokens), with activation checkpointing
so that no chunk keeps its logits for the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gemma_ext.bench.subject import Case, Plain, Subject
from gemma_ext.bench.timing import total_memory

CHUNKS = 8


def _chunk_sum(e: Tensor, c: Tensor, targets: Tensor, softcap: float) -> Tensor:
    logits = torch.tanh(F.linear(e, c) / softcap) * softcap
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def chunked_loss(e: Tensor, c: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Mean loss of e [N, D] against c [V, D]."""
    parts = [
        checkpoint(_chunk_sum, part, c, labels, softcap, use_reentrant=False)
        for part, labels in zip(e.chunk(CHUNKS), targets.chunk(CHUNKS), strict=True)
    ]
    return torch.stack(parts).sum() / len(targets)


def refuse(case: Case) -> str | None:
    needed = 5 * case.logits_bytes // CHUNKS + 3 * case.gradient_bytes
    if needed > 0.85 * total_memory(case.device):
        return f"needs about {needed / 2**30:.0f} GiB"
    return None


def make(case: Case) -> Plain:
    return Plain(lambda e, c, targets: chunked_loss(e, c, targets, case.softcap))


SUBJECTS = [Subject("chunked", make, refuse=refuse)]
