"""torch.nn.functional.linear_cross_entropy with its chunked path.

It has no softcap, so it computes another, cheaper loss: it runs uncapped, is checked against the
uncapped truth, and its row says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gemma_ext.bench.subject import Case, Plain, Subject


def refuse(case: Case) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"absent from torch {torch.__version__}"
    return None


def make(case: Case) -> Plain:
    options = torch.nn.LinearCrossEntropyOptions()
    return Plain(lambda e, c, targets: F.linear_cross_entropy(e, c, targets, options=options))


SUBJECTS = [Subject("torch-lce", make, refuse=refuse, capped=False, fused=True)]
