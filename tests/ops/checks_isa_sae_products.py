"""Products and steering of the instruction set that GEMMA_EXT_CPU_ISA names, against float64.

Prints its name, then a digest of the results that every set with fused multiply-adds shares: those
whose sums are along tokens or entries, never along columns.
"""

import hashlib

import torch
from sae_lists import DTYPES, FORMS, problem
from test_sae_decode import (
    SIZES,
    test_decode_matches_dense_float64,
    test_error_matches_dense_float64,
    test_features_with_more_tokens_than_a_part,
    test_projected_gradient_has_no_parallel_part,
)
from test_sae_products import (
    test_dots,
    test_prefixes_of_a_dictionary,
    test_prefixes_of_a_list,
    test_scatter_is_the_transpose,
)
from test_sae_steer import GATES, MODES, test_every_mode_and_gate

from gemma_ext.ops.sae import decode, scatter

torch.set_num_threads(1)
for dtype in DTYPES:
    for form in FORMS:
        for size in SIZES:
            test_decode_matches_dense_float64(*size, form, dtype, "cpu")
        test_error_matches_dense_float64(form, dtype, "cpu")
        test_dots(form, dtype, "cpu")
        test_scatter_is_the_transpose(form, dtype, "cpu")
        test_prefixes_of_a_dictionary((2, 5), 9, 21, form, dtype, "cpu")
    test_prefixes_of_a_list(3, 20, 64, "padded", dtype, "cpu")
    test_projected_gradient_has_no_parallel_part(dtype, "cpu")
    for mode in MODES:
        for gate in GATES:
            test_every_mode_and_gate("auto", mode, gate, dtype, "cpu")
test_features_with_more_tokens_than_a_part("csr", "cpu")

digest = hashlib.sha256()
for dtype in DTYPES:
    p = problem(1500, 9, 40, 67, dtype=dtype, hot=3)
    leaves = p.leaves()
    out = decode(p.codes.with_values(leaves["values"]), leaves["weight"], leaves["bias"])
    weight, bias = torch.autograd.grad(out, (leaves["weight"], leaves["bias"]), p.rows)
    for x in (out.detach(), weight, bias, *scatter(p.codes, p.rows)):
        digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
print(torch.ops.gemma_ext.cpu_isa(), digest.hexdigest())
