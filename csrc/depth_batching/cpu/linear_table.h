// SPDX-License-Identifier: Apache-2.0
// What of norms and linear layers runs inside one task: the table that every instruction set has.
#pragma once

#include "../../common/cpu/scratch.h"
#include "../linear.h"

namespace gemma_ext::depth_batching {

using gemma_ext::cpu::Scratch;

// Columns that one task computes, and rows that share a pass over them: 64 x 2048 x 4 B of x stay in L2.
constexpr int64_t kColumns = 64, kRows = 64;

// Rows as products take them: floats, or bfloat16 where the instruction set multiplies those; padded with zeros.
struct Packed {
  void* at;
  int64_t width;  // elements between rows
};

struct LinearKernels {
  // Bytes of an element of a packed row.
  int64_t (*packed_size)(DType);
  void (*pack)(const Linear&, int64_t row, const Packed&);
  // low[row, column] = scale x A_j^T of one segment's rows, columns of a rank
  void (*shrink)(const Linear&, const Projection&, int64_t loop, int64_t row0, int64_t row1,
                 int64_t column0, int64_t column1, const Packed& x, const Packed& low, Scratch&);
  // kColumns of one projection, or of two that are gated, from `column` on; low of each
  void (*expand)(const Linear&, int projection, int64_t column, const Packed& x, const Packed* low,
                 Scratch&);
  void (*gather)(const Gather&, int64_t row);
  void (*scatter)(const Scatter&, int64_t row, Scratch&);
};

// Whole vectors of every instruction set are read.
constexpr int64_t kWhole = 32;
constexpr int64_t padded_width(int64_t k) { return (k + kWhole - 1) / kWhole * kWhole; }

}  // namespace gemma_ext::depth_batching
