"""cut-cross-entropy, the authors' Triton kernels, with their default gradient filter."""

from __future__ import annotations

from gemma_ext.bench.subject import Case, Plain, Subject

from . import refuse_without


def refuse(case: Case) -> str | None:
    return refuse_without(case, "cut-cross-entropy", "cut_cross_entropy", "triton")


def make(case: Case) -> Plain:
    from cut_cross_entropy import linear_cross_entropy

    return Plain(lambda e, c, targets: linear_cross_entropy(e, c, targets, softcap=case.softcap))


SUBJECTS = [Subject("cut-ce", make, refuse=refuse, settle=True)]
