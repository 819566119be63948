// SPDX-License-Identifier: Apache-2.0
// Sums over what lies before.
#pragma once

#include "launches.h"

namespace gemma_ext::sae::cuda {

// Of x over earlier threads of the block; adds that of all threads to `total`. Two barriers. `s_warps`: an int a warp.
DEVICE int block_scan(int x, int* s_warps, int& total) {
  int sum = x;
  UNROLL
  for (int step = 1; step < simt::kWarpSize; step *= 2) {
    const int other = simt::shfl_up(sum, step);
    if (simt::lane_idx() >= step) sum += other;
  }
  if (simt::lane_idx() == simt::kWarpSize - 1) s_warps[simt::warp_idx()] = sum;
  simt::sync_block();
  int before = sum - x;
  for (int w = 0; w < simt::block_dim() / simt::kWarpSize; ++w) {
    if (w < simt::warp_idx()) before += s_warps[w];
    total += s_warps[w];
  }
  simt::sync_block();
  return before;
}

// before[i] = sum of counts[0 .. i - 1], i <= count; not below 0 and fewer than 2^31 of 1024 neighbours.
template <class T>
struct ScanParams {
  const T* counts;
  int64_t* before;  // [count + 1]
  int64_t count;
};
void add_scan(Launches&, const ScanParams<int>&);
void add_scan(Launches&, const ScanParams<int64_t>&);

}  // namespace gemma_ext::sae::cuda
