"""Plain torch as transformers writes it for Gemma 2: logits, cap and upcast, all in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_ext.bench.subject import Case, Plain, Subject
from gemma_ext.bench.timing import total_memory


def eager_loss(e: Tensor, c: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Mean loss of e [N, D] against c [V, D]; holds several [N, V] matrices for the backward."""
    logits = F.linear(e, c)
    logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits.float(), targets)


def too_large(case: Case) -> str | None:
    """Refuse what cannot fit: five fp32-sized [N, V] matrices live at the peak of the backward."""
    needed = 5 * case.logits_bytes + 2 * case.gradient_bytes
    have = total_memory(case.device)
    if needed > 0.85 * have:
        return f"needs about {needed / 2**30:.0f} GiB for logits, {have / 2**30:.0f} are there"
    return None


def make(case: Case) -> Plain:
    return Plain(lambda e, c, targets: eager_loss(e, c, targets, case.softcap))


SUBJECTS = [Subject("eager", make, refuse=too_large)]
