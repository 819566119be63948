"""liger-kernel's fused linear cross-entropy: chunks of rows, gradients made in the forward."""

from __future__ import annotations

from gemma_ext.bench.subject import Case, Plain, Subject

from . import refuse_without


def refuse(case: Case) -> str | None:
    return refuse_without(case, "liger-kernel", "liger_kernel", "triton")


def make(case: Case) -> Plain:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=case.softcap)
    return Plain(lambda e, c, targets: loss(c, e, targets))


SUBJECTS = [Subject("liger", make, refuse=refuse, fused=True, settle=True)]
