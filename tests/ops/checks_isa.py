"""Losses and gradients of the instruction set that GEMMA_EXT_CPU_ISA names, against float64."""

import torch
from cce_filter_oracle import sampled, zipf_problem
from cce_impls import KERNELS
from cce_oracle import GRAD_TOL, IGNORE, assert_close, check, expected, problem, run
from divergence_oracle import KINDS
from divergence_oracle import problem as two_heads
from logprobs_oracle import policy, truth
from test_divergence import check as check_divergence
from test_divergence import run as run_divergence

import gemma_ext

print(torch.ops.gemma_ext.cpu_isa())
torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for d, v, n in ((1, 2, 1), (7, 257, 15), (130, 1000, 129), (257, 255, 14), (2304, 300, 33)):
        for softcap, spread in ((None, 3.0), (5.0, 3.0), (30.0, 40.0)):
            p = problem(n, d, v, spread=spread, ignored=0.2, dtype=dtype, seed=d)
            want = expected(p, softcap=softcap, reduction="sum")
            flags = {"return_lse": True, "return_entropy": True, "return_argmax": True}
            for impl in KERNELS:
                got = run(impl.loss, p, softcap=softcap, reduction="sum")
                check(got, want, scale=5, floor=1e-6)
                out, _ = run(impl.loss, p, softcap=softcap, reduction="sum", **flags)
                check((out, got[1]), want, scale=5, floor=1e-6)
    # whole and broken blocks of adjacent rows, rows 4 KiB apart, rows across cache lines, a gap
    for d, v, n, skip in (
        (96, 515, 272, 0),
        (64, 300, 301, 0),
        (2048, 260, 32, 0),
        (96, 257, 48, 8),
        (96, 257, 64, 0),
    ):
        p = problem(n, d + skip, v, dtype=dtype, seed=n)
        p.e, p.c = p.e[:, skip:], p.c[:, skip:]
        if n == 64:
            p.targets[5:21] = IGNORE
        want = expected(p, softcap=30.0, reduction="sum")
        for impl in KERNELS:
            check(run(impl.loss, p, softcap=30.0, reduction="sum"), want, scale=5, floor=1e-6)
    p = zipf_problem(70, 37, 1500, dtype=dtype, seed=1)
    out, got = run(
        gemma_ext.linear_cross_entropy,
        p,
        softcap=8.0,
        impl="cce",
        filter_eps=2.0**-3,
        reduction="sum",
        return_lse=True,
    )
    want = sampled(p, torch.ones(70), tau=2.0**-3, lse=out.lse.detach(), softcap=8.0)
    assert (want.weight == 0).any()
    for name in got:
        assert_close(got[name], want.grads[name], rtol=5 * GRAD_TOL[dtype], what=name)
    for n, d, v in ((1, 1, 2), (15, 130, 257), (70, 96, 520)):
        x = policy(n, d, v, ignored=0.2, dtype=dtype, softcap=9.0)
        options = {"bias": x.bias, "softcap": 9.0, "return_moments": True}
        out = gemma_ext.linear_logprobs(x.e, x.c, x.targets, **options)
        want = truth(x, x.leaves(torch.float64))
        for name in ("logprobs", "entropy", "log_sum_sq_probs", "mean_logits"):
            assert_close(getattr(out, name), want[name], rtol=2e-5, floor=1e-6, what=name)
    for n, d, v, teacher_d in ((1, 1, 2, 7), (15, 130, 257, 64), (270, 96, 520, 96)):
        for kind in KINDS:
            x = two_heads(n, d, v, teacher_d, bias=True, ignored=0.2, dtype=dtype, softcap=9.0)
            check_divergence(x, kind, 0.3, run_divergence(x, kind, 0.3), dtype)
