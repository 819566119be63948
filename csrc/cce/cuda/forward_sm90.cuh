// SPDX-License-Identifier: Apache-2.0
// The forward's strips by wgmma: a persistent kernel whose clusters walk pairs of row blocks against
// tiles of 256 columns. One warp holds whole strips of 16 rows, so nothing is exchanged between warps.
#pragma once

#include "common/tile_wgmma.h"
#include "forward.cuh"

namespace gemma_ext::cce::cuda {

struct StripTmaParams {
  StripParams strips;
  SmallTanh tanh;  // to s log2(e)
  void* e;         // [N, D] the valid rows of e, then zeros
  simt::TensorMap e_map, c_map;
};

constexpr int kCopyThreads = 256;

// A block per row: TMA reads rows that lie side by side.
template <class T>
KERNEL void gather_e_kernel(const GRID_CONSTANT StripTmaParams p) {
  const Head& h = p.strips.head;
  const int64_t r = simt::block_idx();
  const bool valid = r < *p.strips.rows.count;
  const T* from = static_cast<const T*>(h.e);
  if (valid) from += int64_t{p.strips.rows.row[r]} * h.e_stride;
  T* to = static_cast<T*>(p.e) + r * h.D;
  for (int64_t d = 2 * simt::thread_idx(); d < h.D; d += 2 * kCopyThreads) {
    const uint32_t zero = 0;
    *reinterpret_cast<uint32_t*>(to + d) =
        valid ? *reinterpret_cast<const uint32_t*>(from + d) : zero;
  }
}

#if defined(SIMT_HOPPER)
using Accumulators = float[wgmma::kColumns / 2];

template <class T>
using HeadTiles = wgmma::Tiles<T, simt::Major::kK, simt::Major::kK>;

// s log2(e) in place of e.c.
template <class T>
DEVICE void strip_logits(Accumulators& acc, const StripTmaParams& p, int64_t first_column) {
  const Head& h = p.strips.head;
  const LogitMap& map = h.map;
  const bool capped = map.inv_cap > 0.0f;
  const float inverse = capped ? map.inv_cap : map.inv_t * kLog2E, unit = map.scale * inverse;
  float largest = 0.0f;
  UNROLL
  for (int i = 0; i < wgmma::kColumns / 2; ++i) {
    acc[i] *= unit;
    if (h.bias) {
      const int64_t v = first_column + HeadTiles<T>::column_of(i / 4, i % 2);
      if (v < h.V) acc[i] += h.bias[v] * inverse;
    }
    largest = fmaxf(largest, fabsf(acc[i]));
  }
  if (capped && simt::any(largest > 1.0f)) {
    UNROLL
    for (float& x : acc) x = tanh_any(x) * (map.cap_over_t * kLog2E);
  } else if (capped) {
    UNROLL
    for (float& x : acc) x = p.tanh(x);
  }
  if (first_column + kTile > h.V) {
    UNROLL
    for (int i = 0; i < wgmma::kColumns / 2; ++i) {
      const int64_t v = first_column + HeadTiles<T>::column_of(i / 4, i % 2);
      if (v >= h.V) acc[i] = outside(map);
    }
  }
}

template <class T>
DEVICE void strip_epilogue(Accumulators& acc, const StripTmaParams& params, int64_t first_row,
                           int tile, int count) {
  const StripParams& p = params.strips;
  using Tiles = HeadTiles<T>;
  const int64_t first_column = int64_t{tile} * kTile;
  strip_logits<T>(acc, params, first_column);
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + Tiles::row_of(half);
    const auto at = [&](int i) { return acc[i / 2 * 4 + half * 2 + i % 2]; };
    const auto id = [&](int i) {
      return static_cast<int>(first_column) + Tiles::column_of(i / 2, i % 2);
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
#endif

template <class T>
KERNEL_BOUNDS(wgmma::kThreads, 1)
void strip_stats_wgmma_kernel(const GRID_CONSTANT StripTmaParams p) {
#if defined(SIMT_HOPPER)
  const StripParams& strips = p.strips;
  HeadTiles<T> tiles;
  const int count = *strips.rows.count;
  const int pairs = (count + wgmma::kCluster * kBlockRows - 1) / (wgmma::kCluster * kBlockRows);
  const int items = pairs * strips.tiles, step = simt::grid_dim() / wgmma::kCluster;
  const int steps = static_cast<int>((strips.head.D + wgmma::kDepth - 1) / wgmma::kDepth);
  const int first = simt::block_idx() / wgmma::kCluster, rank = simt::cluster_rank();
  const auto first_row = [&](const Raster& at) {
    return (at.row_block * wgmma::kCluster + rank) * kBlockRows;
  };
  if (tiles.is_producer()) {
    tiles.take_producer_registers();
    if (simt::warp_idx() == 0 && simt::elect_one()) {
      for (int item = first; item < items; item += step) {
        const Raster at = raster<kRasterRows / wgmma::kCluster>(item, pairs, strips.tiles);
        tiles.produce(p.e_map, p.c_map, steps, [&](int k) -> wgmma::Place {
          return {k * wgmma::kDepth, first_row(at), k * wgmma::kDepth, at.tile * kTile};
        });
      }
    }
  } else {
    tiles.take_consumer_registers();
    Accumulators acc;
    for (int item = first; item < items; item += step) {
      const Raster at = raster<kRasterRows / wgmma::kCluster>(item, pairs, strips.tiles);
      tiles.consume(acc, steps);
      strip_epilogue<T>(acc, p, first_row(at), at.tile, count);
    }
  }
  tiles.finish();
#endif
}

}  // namespace gemma_ext::cce::cuda
