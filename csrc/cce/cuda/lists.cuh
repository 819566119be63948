// SPDX-License-Identifier: Apache-2.0
// Launches of the gradients of what is drawn, whatever a strip's gradient is.
#pragma once

#include "gradients.cuh"

namespace gemma_ext::cce::cuda {

// Rows are listed and their coefficients known; add_strips(planning of a chunk, grid) launches its strips.
template <class T, bool kLean, class AddStrips>
void add_drawn(Launches& launches, PlanParams planning, const DeSums& sums, const Gradients& out,
               AddStrips add_strips) {
  using M = std::conditional_t<kLean, simt::bf16, float>;  // of masses
  constexpr int kTileShared = mma::Tile<T>::kSharedBytes;
  const Head& h = planning.head;
  const Plan& plan = planning.plan;
  const int64_t tiles = plan.tiles, column_blocks = ceil_div(h.D, mma::kSide);
  const int64_t row_blocks = ceil_div(h.N, kBlockRows), halves = 2 * tiles * row_blocks;  // at most
  const bool exact_elsewhere = planning.exact_elsewhere;
  launches.add(sample_kernel<M>, plan.words, kSampleThreads, kSampleThreads * sizeof(uint32_t),
               planning);
  launches.add(count_kernel, tiles, simt::kWarpSize, 0, planning);
  launches.add(chunk_kernel, 1, kChunkThreads, sizeof(ChunkShared), planning);

  GradientParams p{h, plan, sums, out, static_cast<int>(column_blocks), 0};
  const int chunks = exact_elsewhere ? plan.capacity.sparse_chunks : plan.chunks;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    p.chunk = planning.chunk = chunk;
    launches.add(list_kernel<M>, tiles, kPlanThreads, 0, planning);
    add_strips(planning, taking_turns(halves));
    if (out.dc) {
      launches.add(dc_kernel<T>, taking_turns(2 * tiles * column_blocks), mma::kThreads,
                   kTileShared, p);
    }
    if (out.dbias) {
      launches.add(dbias_kernel<T>, tiles * kSumParts, kSumThreads, kSumSharedBytes, p);
    }
    if (out.de && !exact_elsewhere) {
      launches.add(block_tiles_kernel, row_blocks, kPlanThreads, sizeof(int) * 8, p);
      const auto kernel = [] {
        if constexpr (mma::Tile<T>::kSplit)
          return de_by_tile_kernel<kLean>;
        else
          return de_kernel<T, kLean>;
      }();
      launches.add(kernel, row_blocks * column_blocks, mma::kThreads, kTileShared, p);
    }
    for (int slice = 0; chunk < plan.capacity.sparse_chunks && slice * kSlice < h.D; ++slice) {
      const SliceParams slices{h, plan, sums, out.de, chunk, slice};
      launches.add(parts_kernel<T>, taking_turns(halves), mma::kThreads, kTileShared, slices);
      launches.add(add_parts_kernel<T, kLean>, taking_turns(h.N), kPartThreads, sizeof(RowSlots),
                   slices);
    }
  }
  if (out.de) launches.add(finish_de_kernel<T, kLean>, h.N, kPlanThreads, 0, p);
}

}  // namespace gemma_ext::cce::cuda
