"""Linear layers, norms, head and gates of the instruction set that GEMMA_EXT_CPU_ISA names."""

import torch
from depth_rows import DTYPES
from test_depth_gate import MODES, test_scores_and_exits
from test_depth_head import (
    test_a_row_has_its_bits_alone as head_bits,
)
from test_depth_head import (
    test_against_softmax,
    test_behind_a_norm,
    test_samples_of_every_engine_agree,
)
from test_depth_linear import (
    test_a_row_has_its_bits_alone as linear_bits,
)
from test_depth_linear import (
    test_every_popularity,
    test_every_rank_and_width,
    test_gated,
    test_gates_far_out_are_zero_or_the_number,
)
from test_depth_norm import test_gather, test_scatter
from test_depth_shortlist import (
    test_a_row_has_its_bits_alone as shortlist_bits,
)
from test_depth_shortlist import test_every_row_is_the_head_s

print(torch.ops.gemma_ext.cpu_isa())
torch.set_num_threads(1)
for dtype in DTYPES:
    for sizes in ((4, 4, 4), (1, 0, 12), (70, 61)):
        test_every_popularity("auto", sizes, dtype, "cpu")
    for activation in ("gelu_tanh", "silu"):
        test_gated("auto", "cpu", dtype, activation)
    for n, width, vocabulary in ((1, 1, 1), (7, 33, 255), (9, 100, 257), (130, 24, 999)):
        test_against_softmax("auto", n, width, vocabulary, dtype, "cpu")
    test_behind_a_norm("auto", dtype, "cpu")
    test_every_row_is_the_head_s("cpu", "auto", "margin", dtype)
    for width in (1, 15, 100):
        test_gather("auto", torch.float32, dtype, width, "cpu")
    test_scatter("auto", torch.float32, dtype, "cpu")
    for mode in MODES:
        test_scores_and_exits("auto", mode, dtype, "cpu")
    linear_bits(dtype)
    head_bits(dtype)
    shortlist_bits("cpu", dtype)
for width in (1, 31, 2050):
    test_every_rank_and_width(33, width, "cpu")
test_gates_far_out_are_zero_or_the_number()
test_samples_of_every_engine_agree("cpu")
