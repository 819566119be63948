// SPDX-License-Identifier: Apache-2.0
// The forward's strips by wgmma. One warp holds whole strips of 16 rows, so nothing is exchanged between
// warps.
#pragma once

#include "forward.cuh"
#include "head_sm90.cuh"

namespace gemma_ext::cce::cuda {

struct StripTmaParams {
  StripParams strips;
  HeadTma tma;
};

DEVICE void write_strips(const Accumulators& acc, const StripParams& p, int64_t first_row, int tile,
                         int count) {
  const int64_t first_column = int64_t{tile} * kTile;
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + wgmma::row_of(half);
    const auto at = [&](int i) { return acc[i / 2 * 4 + half * 2 + i % 2]; };
    const auto id = [&](int i) {
      return static_cast<int>(first_column) + wgmma::column_of(i / 2, i % 2);
    };
    const StripSums sums = quad_sums<wgmma::kColumns / 4>(
        p, at, id, [&](int i) { return p.head.class_weight[id(i)]; },
        [&](int i) { return id(i) < p.head.V; });
    const int position = row < count ? p.rows.position[row] : -1;
    if (simt::any(position >= first_column && position < first_column + kTile)) {
      UNROLL
      for (int i = 0; i < wgmma::kColumns / 4; ++i) {
        if (position == id(i)) p.target[row] = at(i) * kLn2;
      }
    }
    if (simt::lane_idx() % 4 == 0 && row < count) write_sums(p, tile, row, sums);
  }
}

template <class T>
KERNEL_BOUNDS(wgmma::kThreads, 1)
void strip_stats_wgmma_kernel(const GRID_CONSTANT StripTmaParams p) {
#if defined(SIMT_HOPPER)
  const int count = *p.strips.rows.count, pairs = pairs_of(count), tiles = p.strips.tiles;
  head_products<T>(
      p.tma, pairs * tiles,
      [&](int item) { return raster<kRasterRows / wgmma::kCluster>(item, pairs, tiles); },
      [&](int64_t first_row, int tile, Accumulators& acc) {
        strip_logits<T>(acc, p.tma, int64_t{tile} * kTile);
        write_strips(acc, p.strips, first_row, tile, count);
      });
#endif
}

}  // namespace gemma_ext::cce::cuda
