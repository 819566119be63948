// SPDX-License-Identifier: Apache-2.0
// Depth batching on the CPU: everything that runs inside a task. Compiled once per instruction set; the namespace is
// the set's name.
#include "attend.h"
#include "gate_kernels.h"
#include "linear_kernels.h"
#include "norm_kernels.h"
#include "rope.h"
#include "screen_kernels.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    {rope_write, attend, join},
    {packed_size, pack, shrink, expand, gather, scatter},
    {packed_size, pack_head, pack_wide, head_tile, noise_row, gate_row, screen_tile, exact_logits,
     capped},
};

}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
