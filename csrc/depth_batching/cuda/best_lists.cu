// SPDX-License-Identifier: Apache-2.0
#include "best_lists.h"

#include "candidates.cuh"

namespace gemma_ext::depth_batching::cuda {
namespace {

// Logits of a part: 16 MiB.
constexpr int64_t kPartBytes = int64_t{16} << 20;

}  // namespace

BestLists::BestLists(Arena& memory, const Head& head, int64_t wanted)
    : n_(head.n), V_(head.V), wanted_(static_cast<int>(wanted)) {
  const int64_t tiles = ceil_div(V_, kHeadTile);
  const int64_t most = kPartBytes / (kHeadTile * 4 * (n_ > 0 ? n_ : 1));
  part_tiles = !wanted ? tiles : most < 1 ? 1 : most < tiles ? most : tiles;
  logits = wanted ? memory.take<float>(n_ * part_tiles * kHeadTile) : nullptr;
  for (int i = 0; i < 2; ++i) {
    values_[i] = memory.take<float>(wanted ? n_ * kMostCandidates : 0);
    ids_[i] = memory.take<int32_t>(wanted ? n_ * kMostCandidates : 0);
  }
}

void BestLists::add(Launches& launches, int64_t first_tile, int64_t tiles) {
  if (!wanted_) return;
  const int64_t id0 = first_tile * kHeadTile, width = tiles * kHeadTile;
  const int count = static_cast<int>(V_ - id0 < width ? V_ - id0 : width);
  const int then = kept_ + count < wanted_ ? kept_ + count : wanted_;
  launches.add(depth_select_kernel, n_, kSelectThreads, sizeof(SelectShared),
               {logits, width, id0, count, kept_, then, values_[now_], ids_[now_],
                values_[1 - now_], ids_[1 - now_]});
  kept_ = then;
  now_ = 1 - now_;
}

void BestLists::sort(Launches& launches, float* values, int32_t* ids) const {
  if (!wanted_) return;
  launches.add(depth_sort_kernel, n_, kSelectThreads, kSortShared,
               {values_[now_], ids_[now_], wanted_, values, ids});
}

}  // namespace gemma_ext::depth_batching::cuda
