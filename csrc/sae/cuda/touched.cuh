// SPDX-License-Identifier: Apache-2.0
// Features that are in a list, ascending.
#pragma once

#include "features.cuh"
#include "scan.cuh"

namespace gemma_ext::sae::cuda {

struct TouchedMemory {
  int *counts, *place;  // of blocks of features; [F] how many come before
  int64_t* before;      // of blocks; the last is how many there are
  int64_t blocks;

  TouchedMemory(Arena& memory, int64_t F);
};

void add_touched_count(Launches&, const Sorted&, int64_t F, const TouchedMemory&);
void add_touched(Launches&, const Sorted&, int64_t F, const TouchedMemory&, int64_t* features);

}  // namespace gemma_ext::sae::cuda
