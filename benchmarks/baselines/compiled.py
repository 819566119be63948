"""The eager loss under torch.compile (inductor fuses the cap, upcast and log-softmax)."""

from __future__ import annotations

import torch

from gemma_ext.bench.subject import Case, Plain, Subject

from .eager import eager_loss, too_large


def make(case: Case) -> Plain:
    torch.compiler.reset()
    compiled = torch.compile(eager_loss, fullgraph=True)
    return Plain(lambda e, c, targets: compiled(e, c, targets, case.softcap))


SUBJECTS = [Subject("compile", make, refuse=too_large, settle=True)]
