// SPDX-License-Identifier: Apache-2.0
// Depth batching on the CPU: everything that runs inside a task. Compiled once per instruction set; the namespace is
// the set's name.
#include "attend.h"
#include "rope.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {{rope_write, attend, join}};

}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
