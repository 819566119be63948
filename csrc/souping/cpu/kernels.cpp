// SPDX-License-Identifier: Apache-2.0
// Weight-space merging on the CPU: everything that runs inside a task. Compiled once per instruction set; the
// namespace is the set's name.

// Only functions that are inlined take vectors wider than the registers.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "mask.h"
#include "merge.h"
#include "rules.h"
#include "soup.h"
#include "sums.h"
#include "survey.h"

namespace gemma_ext::souping::GEMMA_EXT_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {soup, mark, mask,      mask_rows, merge, count,      coarse,
                          fine, sums, gram_rows, apply,     swarm, gather_rows};

}  // namespace gemma_ext::souping::GEMMA_EXT_ISA
