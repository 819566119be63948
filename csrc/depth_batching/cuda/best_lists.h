// SPDX-License-Identifier: Apache-2.0
// The best of every row, whose logits come a part of the vocabulary after the other: launches, and memory of a part,
// which stays in L2.
#pragma once

#include "head_engine.h"
#include "launches.h"

namespace gemma_ext::depth_batching::cuda {

class BestLists {
 public:
  // Of `wanted` tokens a row, up to kMostCandidates; with 0 the vocabulary is one part without memory.
  BestLists(Arena& memory, const Head& head, int64_t wanted);

  // Behind the launch that wrote the logits of these tiles.
  void add(Launches&, int64_t first_tile, int64_t tiles);

  // [n, wanted], in descending order, equal ones by their ids.
  void sort(Launches&, float* values, int32_t* ids) const;

  int64_t part_tiles;
  float* logits;  // [n, tiles of a part * kHeadTile], or null

 private:
  int64_t n_, V_;
  int wanted_, kept_ = 0, now_ = 0;
  float* values_[2];
  int32_t* ids_[2];
};

}  // namespace gemma_ext::depth_batching::cuda
