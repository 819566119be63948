// SPDX-License-Identifier: Apache-2.0
// What runs inside one task: the table of the kernels that every instruction set has.
#pragma once

#include "../../common/cpu/scratch.h"
#include "../contract.h"
#include "head_table.h"
#include "linear_table.h"

namespace gemma_ext::depth_batching {

using gemma_ext::cpu::Scratch;

// A multiple of the floats of every instruction set's vector.
constexpr int kPad = 16;

// Rows row0 .. row0 + rows of one request and loop at positions that follow each other, one head of K, splits
// split0 .. split1 of the keys.
struct AttendTask {
  const Attention* call;
  int64_t row0, rows, head, split0, split1;
  // [splits, rows * group, kPartHead + width up to kPad]; null: the results are written
  float* parts;
};

// Floats before a part's sums: the maximum of its scores, the sum of its weights; the rest aligns.
constexpr int kPartHead = 16;

struct KvKernels {
  void (*rope_write)(const RopeWrite&, int64_t row, Scratch&);
  void (*attend)(const AttendTask&, Scratch&);
  // Joins the parts of a task from left to right and writes the results.
  void (*join)(const AttendTask&);
};

struct Kernels {
  KvKernels kv;
  LinearKernels linear;
  HeadKernels head;
};

// Of the chosen instruction set.
const Kernels& kernels();

}  // namespace gemma_ext::depth_batching
