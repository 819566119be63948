// SPDX-License-Identifier: Apache-2.0
// Sparse dictionaries on the CPU: everything that runs inside a task. Compiled once per instruction
// set; the namespace is the set's name.
#include "encode.h"
#include "products_kernels.h"

namespace gemma_ext::sae::GEMMA_EXT_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {encode, compute};

}  // namespace gemma_ext::sae::GEMMA_EXT_ISA
