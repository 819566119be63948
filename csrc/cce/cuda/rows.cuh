// SPDX-License-Identifier: Apache-2.0
// Rows that take part, gathered on the device: ignored rows cost nothing afterwards and the host never
// learns how many there are.
#pragma once

#include "common/cuda/raster.h"
#include "launches.h"

namespace gemma_ext::cce::cuda {

using gemma_ext::cuda::kRasterRows;
using gemma_ext::cuda::Raster;
using gemma_ext::cuda::raster;

constexpr int kMissing = -1;  // no target in this vocabulary: nll = lse
constexpr int kInvalid = -2;  // outside [0, V) though it must not be: nll = NaN

struct Rows {
  int* row;    // [N] row of e of each valid token, ascending
  int* label;  // [N] its label, kMissing, kInvalid
  int* count;  // how many

  Rows(Arena& memory, const Head& h)
      : row(memory.take<int>(h.N)), label(memory.take<int>(h.N)), count(memory.take<int>(1)) {}
};

// How many earlier threads of the block set their flag; adds the block's number to `total`. Two barriers.
template <int kThreads>
DEVICE int block_rank(bool flag, int* s_counts, int& total) {
  const unsigned votes = simt::ballot(flag);
  if (simt::lane_idx() == 0) s_counts[simt::warp_idx()] = simt::popcount(votes);
  simt::sync_block();
  int rank = simt::popcount(votes & ((1u << simt::lane_idx()) - 1));
  UNROLL
  for (int w = 0; w < kThreads / simt::kWarpSize; ++w) {
    if (w < simt::warp_idx()) rank += s_counts[w];
    total += s_counts[w];
  }
  simt::sync_block();
  return rank;
}

void gather_rows(Launches&, const Head&, const Rows&);

}  // namespace gemma_ext::cce::cuda
