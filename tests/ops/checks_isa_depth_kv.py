"""Rows and pages with the instruction set that GEMMA_EXT_CPU_ISA names, against float64.

Prints its name.
"""

import torch
from depth_pages import DTYPES
from test_depth_attention import (
    OPTIONS,
    test_bits_do_not_depend_on_the_rows_beside,
    test_matches_the_formula,
    test_shapes,
)
from test_depth_kv import test_matches_the_formula as test_writes

torch.set_num_threads(1)
for dtype in DTYPES:
    for options in OPTIONS:
        test_matches_the_formula("auto", options, dtype, "cpu")
    for heads, width in (((8, 4), 256), ((6, 2), 80), ((3, 1), 37), ((2, 1), 1)):
        test_shapes(heads, width, dtype, "cpu")
    test_bits_do_not_depend_on_the_rows_beside("auto", dtype, "cpu")
    test_writes("auto", ((8, 1), 37, 18), "by loop", dtype, "cpu")
print(torch.ops.gemma_ext.cpu_isa())
