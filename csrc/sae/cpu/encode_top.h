// SPDX-License-Identifier: Apache-2.0
// Lists of the k best of every row, from the tasks of a plan.
#pragma once

#include <vector>

#include "encode_plan.h"
#include "engine.h"

namespace gemma_ext::sae::cpu {

using gemma_ext::cpu::Scratch;

class TopResult {
 public:
  // k 0: nothing is wanted.
  TopResult(const Encoder&, int64_t k, bool by_magnitude, const uint8_t* mask, float* values,
            int32_t* indices);

  bool wanted() const { return k_ > 0; }
  // Of one row in a task.
  int64_t row_bytes() const;
  void plan(const Plan&);
  // Empty lists for the rows of a task, in `slot` of its memory.
  TopLists open(const EncodeTask&, Slot slot, Scratch&) const;
  // What the lists of task t hold, best first.
  void close(const EncodeTask&, int64_t t, TopLists&);
  // The lists of all parts of each row become one.
  void merge(Workers&);

 private:
  int64_t N_, k_, capacity_;
  const float* scale_;
  const uint8_t* mask_;
  bool by_magnitude_;
  float* values_;     // [N, k]
  int32_t* indices_;  // [N, k]
  int64_t parts_ = 1;
  std::vector<float> part_values_;     // [parts, N, k], if there are several
  std::vector<int32_t> part_indices_;  // -1 behind the last
};

}  // namespace gemma_ext::sae::cpu
