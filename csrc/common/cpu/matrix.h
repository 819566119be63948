// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../dtype.h"

namespace gemma_ext::cpu {

struct Matrix {
  const void* data;
  DType dtype;
  int64_t rows, cols;
  int64_t row_stride, col_stride;  // in elements
};

}  // namespace gemma_ext::cpu
