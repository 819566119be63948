// SPDX-License-Identifier: Apache-2.0
// The forward's strips by wgmma. One warp holds whole strips of 16 rows, so nothing is exchanged between
// warps.
#pragma once

#include "cce/cuda/forward.cuh"
#include "head.cuh"

namespace gemma_ext::cce::cuda {

struct StripTmaParams {
  StripParams strips;
  HeadTma tma;
  void* kept;  // KeptStrips
  int kept_rows;
};

// acc becomes exp(s - max) ds/da T, if that is kept, and 0 at the label.
template <bool kKeep, Sums kSums>
DEVICE void write_strips(Accumulators& acc, const StripParams& p, int64_t first_row, int tile,
                         int count) {
  const int64_t first_column = int64_t{tile} * kTile;
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + wgmma::row_of(half);
    const auto at = [&](int i) { return acc[wgmma::element(half, i)]; };
    const auto id = [&](int i) { return static_cast<int>(first_column) + wgmma::column(i); };
    const int label = row < count ? p.rows.label[row] : -1;
    if (simt::any(label >= first_column && label < first_column + kTile)) {
      UNROLL
      for (int i = 0; i < wgmma::kRowElements; ++i) {
        if (label != id(i)) continue;
        p.target[row] = at(i) * kLn2;
        acc[wgmma::element(half, i)] = outside(p.head.map);
      }
    }
    // of a strip whose only column is the label nothing is kept
    const bool lone = label == first_column && first_column + 1 == p.head.V;
    const float t = p.head.map.t_over_cap * kLn2, whole = row < count && !lone ? 1.0f : 0.0f;
    const StripSums sums = quad_sums<kSums, true, kKeep ? 1 : 4, wgmma::kRowElements>(
        p, at, id, [&](int i) { return p.head.class_weight[id(i)]; },
        [&](int i) { return id(i) < p.head.V && id(i) != label; },
        [&](int i, float x, float e) {
          if constexpr (kKeep) {
            const float slope =
                p.head.map.inv_cap > 0.0f ? whole - whole * (x * t) * (x * t) : whole;
            acc[wgmma::element(half, i)] = e * slope;
          }
        });
    if (simt::lane_idx() % 4 == 0 && row < count) write_sums(p, tile, row, sums);
  }
}

#if defined(SIMT_HOPPER)
template <class T, bool kKeep, Sums kSums>
DEVICE void strip_stats(const StripTmaParams& p) {
  const int count = *p.strips.rows.count, pairs = pairs_of(count), tiles = p.strips.tiles;
  head_products<T>(
      p.tma, pairs * tiles,
      [&](int item) {
        const Raster at = raster<kRasterRows / wgmma::kCluster>(item, pairs, tiles);
        return Raster{at.row_block, p.strips.first_tile + at.tile};
      },
      [&](int first_row, int tile, Accumulators& acc) {
        strip_logits(acc, p.tma, int64_t{tile} * kTile);
        write_strips<kKeep, kSums>(acc, p.strips, first_row, tile, count);
        if constexpr (kKeep) {
          T* kept = static_cast<T*>(p.kept) + (int64_t{tile} * p.kept_rows + first_row) * kTile;
          store_strips(acc, kept, p.kept_rows - first_row);
        }
      });
}
#endif

template <class T, Sums kSums>
KERNEL_BOUNDS(wgmma::kThreads, 1)
void strip_stats_wgmma_kernel(const GRID_CONSTANT StripTmaParams p) {
#if defined(SIMT_HOPPER)
  strip_stats<T, false, kSums>(p);
#endif
}

template <class T>
KERNEL_BOUNDS(wgmma::kThreads, 1)
void keep_strips_wgmma_kernel(const GRID_CONSTANT StripTmaParams p) {
#if defined(SIMT_HOPPER)
  strip_stats<T, true, Sums::kPlain>(p);
#endif
}

}  // namespace gemma_ext::cce::cuda
