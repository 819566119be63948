// SPDX-License-Identifier: Apache-2.0
// Rows as the head multiplies them: h, or its norms in the type of the weight.
#pragma once

#include "head_engine.h"
#include "launches.h"

namespace gemma_ext::depth_batching::cuda {

class HeadRows {
 public:
  HeadRows(Arena& memory, const Head& head);

  // `lengths` [n]: |x| of every row, from above; null: not wanted.
  void add(Launches&, float* lengths = nullptr) const;

  const void* x;   // [n, stride] in the type of weight
  int64_t stride;  // whole 16-byte words

 private:
  Head head_;
  void* normed_;  // x, or null
};

}  // namespace gemma_ext::depth_batching::cuda
