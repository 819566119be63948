// SPDX-License-Identifier: Apache-2.0
// What an encoder's task keeps of the pre-activations that pass it. Kernels of every instruction set
// see this file: no function of it is shared between their builds but those that encode_lists.cpp holds.
#pragma once

#include "../contract.h"

namespace gemma_ext::sae {

// What is compared; scale [F] or null.
static inline float score_of(float p, int32_t feature, const float* scale, bool by_magnitude) {
  const float s = by_magnitude && p < 0 ? -p : p;
  return scale ? s * scale[feature] : s;
}

// The k best so far of each row of a task, and some that may not be, ascending by feature.
struct TopLists {
  struct Entry {
    float p;
    int32_t feature;
  };
  Entry* entries;       // [rows, capacity]
  int32_t* count;       // [rows]
  float* limit;         // [rows] a score that does not exceed it is out; NaN: all are in
  uint8_t* closed;      // [rows] full of NaNs, so that nothing is in
  int64_t k, capacity;  // capacity >= k, and room for a vector
  const float* scale;   // [F] or null
  const uint8_t* mask;  // [F] or null: all are allowed
  bool by_magnitude;
};

// Leaves the k best of a row, and raises its limit where there are so many.
void shrink(TopLists&, int64_t row);

// The best of each group in each row; index -1 where there is none yet.
struct GroupBest {
  float* values;     // [N, groups]
  int32_t* indices;  // [N, groups]
  int64_t groups, size;
};

class Spans;

// The scores of a task above a limit; a row's ascend by feature.
struct Above {
  struct Entry {
    float p;
    int32_t feature, row;
  };
  const float* limits = nullptr;  // [F], or null: `limit`
  float limit = 0;
  bool inclusive = false;
  const float* scale = nullptr;   // [F] or null
  uint8_t* nan_listed = nullptr;  // [rows of the task]
  Entry* entries = nullptr;
  int64_t count = 0, capacity = 0;
  Spans* spans = nullptr;  // of a batch: `limit` rises
  int64_t settled = 0, kept = 0;

  Above();
  ~Above();
  Above(const Above&) = delete;
  Above& operator=(const Above&) = delete;
};

// Memory for `more` entries behind the last.
Above::Entry* room(Above&, int64_t more) noexcept;

// Counts the new entries in the spans, raises the limit, and may drop what does not exceed it.
void settle(Above&) noexcept;

}  // namespace gemma_ext::sae
