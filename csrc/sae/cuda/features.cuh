// SPDX-License-Identifier: Apache-2.0
// The entries of a list by feature, and how they are shared out: runs of at most `run` entries of one feature,
// added one after another. A block takes the runs that begin in its window of `run` places. A feature of one run is
// written at once, another's runs become partial sums that are added in their order. Which entries make a run
// follows from the list alone.
#pragma once

#include "nested.cuh"
#include "sort.cuh"

namespace gemma_ext::sae::cuda {

struct Sorted {
  const uint32_t* feature;  // [entries] by place; F: nobody's, and those that name no feature
  const int* entry;         // [entries]
  int* start;               // [F + 1]
  int* token;               // [entries] by entry: its row of those that are summed
};

struct FeatureMemory {
  SortMemory sort;
  Sorted sorted;
  int64_t run, windows;

  FeatureMemory(Arena& memory, const List& list)
      : sort(memory, list.entries, bits_of(list.F)),
        sorted{sort.sorted().key, sort.sorted().id, memory.take<int>(list.F + 1),
               memory.take<int>(list.entries)},
        run(256) {
    // partial sums of at most this many windows are held: 75 MB at D 2304
    constexpr int64_t kMostWindows = 4096;
    while (ceil_div(list.entries, run) > kMostWindows) run *= 2;
    windows = ceil_div(list.entries, run);
  }
};

// With levels an entry's row is that of its token and level, and those of no level are left out.
void add_by_feature(Launches&, const List&, const FeatureMemory&, const Levels* levels = nullptr);

// Gradients [entries] of values that are in no sum: 0, and NaN where they name no feature. The others are not touched.
void add_clear(Launches&, const List&, float* d_values, const Levels* levels = nullptr);

}  // namespace gemma_ext::sae::cuda
