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
  void* kept;  // KeptStrips
  int kept_rows;
};

// acc becomes exp(s - max) ds/da T, if that is kept.
template <bool kKeep>
DEVICE void write_strips(Accumulators& acc, const StripParams& p, int64_t first_row, int tile,
                         int count) {
  const int64_t first_column = int64_t{tile} * kTile;
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + wgmma::row_of(half);
    const auto at = [&](int i) { return acc[i / 2 * 4 + half * 2 + i % 2]; };
    const auto place = [&](int i) { return first_column + wgmma::column_of(i / 2, i % 2); };
    const auto id = [&](int i) { return column_id(p.head, place(i)); };
    const StripSums sums = quad_sums<wgmma::kColumns / 4>(
        p, at, id, [&](int i) { return p.head.class_weight[id(i)]; },
        [&](int i) { return place(i) < p.head.V; });
    const int position = row < count ? p.rows.position[row] : -1;
    if (simt::any(position >= first_column && position < first_column + kTile)) {
      UNROLL
      for (int i = 0; i < wgmma::kColumns / 4; ++i) {
        if (position == place(i)) p.target[row] = at(i) * kLn2;
      }
    }
    if (simt::lane_idx() % 4 == 0 && row < count) write_sums(p, tile, row, sums);
    if constexpr (kKeep) {
      const float base = sums.max == -kInfinity ? 0.0f : sums.max * kLog2E;
      const float t = p.head.map.t_over_cap * kLn2;
      UNROLL
      for (int i = 0; i < wgmma::kColumns / 4; ++i) {
        float& x = acc[i / 2 * 4 + half * 2 + i % 2];
        const float e = row < count ? simt::exp2_approx(x - base) : 0.0f;
        x = p.head.map.inv_cap > 0.0f ? e * (1.0f - x * t * (x * t)) : e;
      }
    }
  }
}

#if defined(SIMT_HOPPER)
template <class T, bool kKeep>
DEVICE void strip_stats(const StripTmaParams& p) {
  const int count = *p.strips.rows.count, pairs = pairs_of(count), tiles = p.tma.tiles;
  head_products<T>(
      p.tma, pairs * tiles,
      [&](int item) {
        const Raster at = raster<kRasterRows / wgmma::kCluster>(item, pairs, tiles);
        return Raster{at.row_block, p.tma.first_tile + at.tile};
      },
      [&](int first_row, int tile, Accumulators& acc) {
        strip_logits(acc, p.tma, int64_t{tile} * kTile);
        write_strips<kKeep>(acc, p.strips, first_row, tile, count);
        if constexpr (kKeep) {
          T* kept = static_cast<T*>(p.kept) + (int64_t{tile} * p.kept_rows + first_row) * kTile;
          store_strips(acc, kept, p.kept_rows - first_row);
        }
      });
}
#endif

template <class T>
KERNEL_BOUNDS(wgmma::kThreads, 1)
void strip_stats_wgmma_kernel(const GRID_CONSTANT StripTmaParams p) {
#if defined(SIMT_HOPPER)
  strip_stats<T, false>(p);
#endif
}

template <class T>
KERNEL_BOUNDS(wgmma::kThreads, 1)
void keep_strips_wgmma_kernel(const GRID_CONSTANT StripTmaParams p) {
#if defined(SIMT_HOPPER)
  strip_stats<T, true>(p);
#endif
}

struct OrderedParams {
  Head head;
  void* c;      // [tiles, kTile, D] in the order of the vocabulary
  float* bias;  // [tiles, kTile]
  int first_tile;
};

// A block per row.
template <class T>
KERNEL void gather_c_kernel(OrderedParams p) {
  const int64_t v = int64_t{p.first_tile} * kTile + simt::block_idx(), D = p.head.D;
  const T* from = v < p.head.V ? static_cast<const T*>(p.head.c) +
                                     int64_t{column_id(p.head, v)} * p.head.c_stride
                               : nullptr;
  copy_row(static_cast<T*>(p.c) + simt::block_idx() * D, from, D);
  if (p.head.bias && simt::thread_idx() == 0) {
    p.bias[simt::block_idx()] = from ? p.head.bias[column_id(p.head, v)] : 0.0f;
  }
}

// Tiles copied at a time for another order.
inline int ordered_tiles(const Head& h, int64_t copy_bytes) {
  const int64_t fit = copy_bytes / (kTile * h.D * size_of(h.dtype)), all = tiles_of(h.V);
  return static_cast<int>(fit < 1 ? 1 : fit < all ? fit : all);
}

template <class T>
void add_strips_wgmma(Launches& launches, const StripParams& strips, const KeptStrips& kept,
                      void* e, void* ordered, int64_t copy_bytes) {
  const Head& h = strips.head;
  const int64_t pairs = ceil_div(h.N, kPairRows);
  StripTmaParams p{strips, gather_e<T>(launches, h, strips.rows, e), kept.strips,
                   static_cast<int>(kept.rows)};
  if (!h.order) {
    return add_wgmma(launches,
                     kept.strips ? keep_strips_wgmma_kernel<T> : strip_stats_wgmma_kernel<T>,
                     pairs * strips.tiles, p);
  }
  const int step = ordered_tiles(h, copy_bytes);
  float* bias = reinterpret_cast<float*>(static_cast<T*>(ordered) + int64_t{step} * kTile * h.D);
  if (h.bias) p.tma.bias = bias;
  for (int first = 0; first < strips.tiles; first += step) {
    p.tma.first_tile = first;
    p.tma.tiles = step < strips.tiles - first ? step : strips.tiles - first;
    const int64_t rows = int64_t{p.tma.tiles} * kTile;
    launches.add(gather_c_kernel<T>, rows, kCopyThreads, 0, {h, ordered, bias, first});
    launches.check(wgmma::make_map<T, simt::Major::kK>(&p.tma.c_map, ordered, rows, h.D, h.D));
    add_wgmma(launches, strip_stats_wgmma_kernel<T>, pairs * p.tma.tiles, p);
  }
}

}  // namespace gemma_ext::cce::cuda
