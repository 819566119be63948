// SPDX-License-Identifier: Apache-2.0
// A call's mask on the device.
#pragma once

#include "table.h"

namespace gemma_ext::souping::cuda {

struct CutPlan {
  const int32_t* bits;  // [G, streams], null: no cut
  int64_t* left;        // [G, streams], the caller's ties, counted down
  int64_t* ties;        // the same as they were before the call
  Word* state;          // [chunks, streams] (ties.cuh)
  int64_t groups;
  int streams;
  bool variance;
};

struct MaskPlan {
  CutPlan cut[2];         // keep, drop
  Word* ticket;           // of each launch the next chunk, where there are cuts
  const double* density;  // [T, M] or null
  const float* marks;  // [M, stride] or null: 0 where not kept, else what survivors are divided by
  const int64_t* marked;  // [T] elements before each part
  int64_t stride, first;  // marks of a model; elements before the first of them
  bool rescale;

  HOST_DEVICE bool cuts() const { return cut[0].bits || cut[1].bits; }
  HOST_DEVICE bool any() const { return cuts() || density || marks; }
};

// `memory` is for what no upload brings; call this after the last one. In `launches` of one kernel go all chunks.
void take_cuts(MaskPlan&, const Mask&, int models, int64_t chunks, int64_t launches, Arena& memory);
// Before the first of them.
void start_cuts(const MaskPlan&, int64_t chunks, int64_t launches, Launches&);

}  // namespace gemma_ext::souping::cuda
