// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "products_nested.h"
#include "steer_kernels.h"

namespace gemma_ext::sae::GEMMA_EXT_ISA {

extern const ProductKernels kProductKernels;
const ProductKernels kProductKernels = {
    decode,      dots,           column_sums, segment, join,  nested,
    nested_rows, nested_segment, finish,      fires,   steer,
};

}  // namespace gemma_ext::sae::GEMMA_EXT_ISA
