// SPDX-License-Identifier: Apache-2.0
#include "touched.cuh"

namespace gemma_ext::sae::cuda {
namespace {

constexpr int kFeatures = 4096;  // of a block

struct TouchedParams {
  const int* start;
  TouchedMemory memory;
  int64_t F;
  int64_t* features;  // null: count
};

KERNEL_BOUNDS(kThreads, 4)
void touched_kernel(TouchedParams p) {
  int* s_warps = simt::shared<int>();
  int total = 0;
  for (int64_t i = 0; i < kFeatures; i += kThreads) {
    const int64_t f = int64_t{simt::block_idx()} * kFeatures + i + simt::thread_idx();
    const bool touched = f < p.F && p.start[f] < p.start[f + 1];
    const int before = total, rank = block_scan(touched, s_warps, total);
    if (!p.features || f >= p.F) continue;
    const int64_t at = p.memory.before[simt::block_idx()] + before + rank;
    p.memory.place[f] = static_cast<int>(at);
    if (touched) p.features[at] = f;
  }
  if (!p.features && simt::thread_idx() == 0) p.memory.counts[simt::block_idx()] = total;
}

void add_pass(Launches& launches, const TouchedParams& p) {
  launches.add(touched_kernel, p.memory.blocks, kThreads, kThreads / simt::kWarpSize * sizeof(int),
               p);
}

}  // namespace

TouchedMemory::TouchedMemory(Arena& memory, int64_t F)
    : counts(memory.take<int>(ceil_div(F, kFeatures))),
      place(memory.take<int>(F)),
      before(memory.take<int64_t>(ceil_div(F, kFeatures) + 1)),
      blocks(ceil_div(F, kFeatures)) {}

void add_touched_count(Launches& launches, const Sorted& sorted, int64_t F,
                       const TouchedMemory& m) {
  add_pass(launches, {sorted.start, m, F, nullptr});
  add_scan(launches, ScanParams<int>{m.counts, m.before, m.blocks});
}

void add_touched(Launches& launches, const Sorted& sorted, int64_t F, const TouchedMemory& m,
                 int64_t* features) {
  add_pass(launches, {sorted.start, m, F, features});
}

}  // namespace gemma_ext::sae::cuda
