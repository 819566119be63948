"""quack-kernels' chunked linear cross-entropy in CuTe; it has no softcap and runs uncapped."""

from __future__ import annotations

from gemma_ext.bench.subject import Case, Plain, Subject

from . import refuse_without


def refuse(case: Case) -> str | None:
    return refuse_without(case, "quack-kernels", "quack", "cutlass", "tvm_ffi")


def make(case: Case) -> Plain:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return Plain(chunked_linear_cross_entropy)


SUBJECTS = [Subject("quack", make, refuse=refuse, capped=False, fused=True, settle=True)]
