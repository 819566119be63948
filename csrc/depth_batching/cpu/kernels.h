// SPDX-License-Identifier: Apache-2.0
// What runs inside one task: the table of the kernels that every instruction set has.
#pragma once

#include "../../common/cpu/scratch.h"
#include "../contract.h"

namespace gemma_ext::depth_batching {

using gemma_ext::cpu::Scratch;

// Rows row0 .. row0 + rows of one request and loop at positions that follow each other, one head of K, splits
// split0 .. split1 of the keys.
struct AttendTask {
  const Attention* call;
  int64_t row0, rows, head, split0, split1;
  float* parts;  // [rows, group, splits of the task, kPartHead + width]; null: the results are written
};

constexpr int kPartHead = 16;  // floats before a part's sums: the maximum, the sum of weights

struct KvKernels {
  void (*rope_write)(const RopeWrite&, int64_t row, Scratch&);
  void (*attend)(const AttendTask&, Scratch&);
  // Joins the parts of a row's head from left to right.
  void (*join)(const Attention&, int64_t row, int64_t head, const float* parts, int64_t splits,
               Scratch&);
};

struct Kernels {
  KvKernels kv;
};

// Of the chosen instruction set.
const Kernels& kernels();

}  // namespace gemma_ext::depth_batching
