"""Encoders of the instruction set that GEMMA_EXT_CPU_ISA names, where products are exact."""

import torch
from sae_encoders import DTYPES, check, problem, topk

from gemma_ext.ops.sae import (
    encode_batch_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
)

print(torch.ops.gemma_ext.cpu_isa())
torch.set_num_threads(1)
for dtype in DTYPES:
    for n, width, features in ((1, 7, 300), (15, 33, 517), (130, 257, 1030), (257, 96, 512)):
        q = problem(n, width, features, dtype=dtype)
        transposed = q.weight.T.contiguous().T
        p = q.p
        for weight in (q.weight, transposed):
            got = encode_topk(q.x, weight, q.bias, k=9, scale=q.scale, aux=(q.mask, 4))
            check(got.codes, p, topk(p * q.scale, 9))
            check(got.aux, p, topk(p * q.scale, 4, q.mask))
        got = encode_topk(q.x, q.weight, q.bias, k=9, by="magnitude").codes
        check(got, p, topk(p.abs(), 9))
        size = next(s for s in (47, 10, 8, 11, 5, 1) if features % s == 0)
        parts = p.view(n, -1, size)
        first = [[g * size + r.index(max(r)) for g, r in enumerate(row)] for row in parts.tolist()]
        check(encode_group_max(q.x, q.weight, q.bias, groups=features // size), p, first)
        above = [row.nonzero().flatten().tolist() for row in p * q.scale > 2]
        got = encode_threshold(q.x, q.weight, q.bias, threshold=2.0, scale=q.scale).codes
        check(got, p, above)
        total = sum(map(len, above))
        got = encode_batch_topk(q.x, q.weight, q.bias, total=total, scale=q.scale)
        check(got.codes, p, above)
        assert got.min_positive == (p * q.scale)[p * q.scale > 2].min()
