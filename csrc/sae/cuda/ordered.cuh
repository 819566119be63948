// SPDX-License-Identifier: Apache-2.0
// Entries in no order to a list whose rows ascend by feature.
#pragma once

#include "scan.cuh"
#include "sort.cuh"

namespace gemma_ext::sae::cuda {

struct Entry {
  float p;
  int feature, row;
};

struct OrderMemory {
  SortMemory by_feature, by_row;
  int* counts;  // [N]

  OrderMemory(Arena& memory, int64_t room, int64_t F, int64_t N)
      : by_feature(memory, room, bits_of(F)),
        by_row(memory, room, bits_of(N)),
        counts(memory.take<int>(N)) {}
};

// Of `count` entries on the device, at most room: values and indices [room], 0 behind the last, offsets [N + 1].
struct OrderCall {
  const Entry* entries;
  const int* count;
  int64_t room, N;
  float* values;
  int32_t* indices;
  int64_t* offsets;
};
void add_order(Launches&, const OrderMemory&, const OrderCall&);

}  // namespace gemma_ext::sae::cuda
