// SPDX-License-Identifier: Apache-2.0
// Exact gradients by wgmma, a chunk of tiles at a time: all rows of a tile are gradient strips, side by
// side, so that TMA reads them along either index.
//   G as in strips.cuh,   dC = G^T E,   dE = sum over the chunks of G C
#pragma once

#include "cce/cuda/strips.cuh"
#include "head.cuh"

namespace gemma_ext::cce::cuda {

// Strips of one chunk: [chunk_tiles, stride, kTile], zero behind the last valid row of its 128.
struct Dense {
  HeadTma tma;
  Coefficients* row{};  // [N]
  float* unit{};        // [2]
  void* strips{};
  float* de_sum{};  // [N, D]
  Gradients out{};
  const int* listed{};            // of the plan: nothing is done where lists are, or null
  const float *max{}, *target{};  // [tiles, N] and [N] of a forward that kept its strips, or null
  int64_t stride{};               // rows of a tile, whole blocks
  int tiles{}, chunk_tiles{}, slices{};
  int chunk{};
  // operands of dC = G^T E and of dE = G C
  simt::TensorMap g_map{}, e_map{}, g_rows_map{}, c_map{};

  explicit Dense(const HeadTma& head) : tma(head) {}
};

DEVICE bool is_listed(const Dense& p) { return p.listed && *p.listed; }
DEVICE int first_tile_of(const Dense& p) { return p.chunk * p.chunk_tiles; }
DEVICE int tiles_at_hand(const Dense& p) {
  return lesser(p.chunk_tiles, p.tiles - first_tile_of(p));
}

#if defined(SIMT_HOPPER)
// kGeneral: rows have a q or a class coefficient.
template <class T, bool kGeneral>
DEVICE void dense_strips(const Dense& p) {
  if (is_listed(p)) return;
  const Head& h = p.tma.head;
  const Rows& rows = p.tma.rows;
  const int count = *rows.count, pairs = pairs_of(count), first_tile = first_tile_of(p);
  const float unscale = h.map.scale * h.map.inv_t / p.unit[0], t = h.map.t_over_cap * kLn2;
  head_products<T>(
      p.tma, pairs * tiles_at_hand(p),
      [&](int item) {
        const Raster at = raster<kRasterRows / wgmma::kCluster>(item, pairs, tiles_at_hand(p));
        return Raster{at.row_block, first_tile + at.tile};
      },
      [&](int first_row, int tile, Accumulators& acc) {
        const int first_column = tile * kTile;
        strip_logits(acc, p.tma, first_column);
        UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + wgmma::row_of(half);
          // no probability and no label behind the last row
          float lse = kInfinity, a = 0.0f, at_label = 0.0f, q = 0.0f, class_coef = 0.0f;
          float mean = 0.0f;
          int label = -1;
          if (row < count) {
            const Coefficients& c = p.row[row];
            lse = c.lse * kLog2E;
            a = c.a * unscale;
            at_label = c.at_label * unscale;
            q = c.q * (kLn2 * unscale);
            mean = c.mean * kLog2E;
            class_coef = c.class_coef * unscale;
            label = rows.label[row] - first_column;
          }
          UNROLL
          for (int i = 0; i < wgmma::kRowElements; ++i) {
            float& x = acc[wgmma::element(half, i)];
            const int column = wgmma::column(i);
            const float prob = simt::exp2_approx(x - lse);
            float g = label == column ? at_label : prob * a;
            if constexpr (kGeneral) {
              if (prob > 0.0f) g += prob * q * (x - mean);
              if (h.class_weight && first_column + column < h.V) {
                g += class_coef * h.class_weight[first_column + column];
              }
            }
            const float u = fmaxf(x, -1e30f) * t;  // t = 0 without a cap, where x may be -inf
            x = g * (1.0f - u * u);
          }
        }
        T* strips =
            static_cast<T*>(p.strips) + ((tile - first_tile) * p.stride + first_row) * kTile;
        store_strips(acc, strips, static_cast<int>(p.stride) - first_row);
      });
}
#endif

template <class T>
KERNEL_BOUNDS(wgmma::kThreads, 1)
void dense_strips_wgmma_kernel(const GRID_CONSTANT Dense p) {
#if defined(SIMT_HOPPER)
  dense_strips<T, false>(p);
#endif
}

// Spills: of two more coefficients and the class weights.
template <class T>
KERNEL_BOUNDS(wgmma::kThreads, 1)
void dense_general_strips_wgmma_kernel(const GRID_CONSTANT Dense p) {
#if defined(SIMT_HOPPER)
  dense_strips<T, true>(p);
#endif
}

// An item is a tile and 256 columns of D; either block of a cluster has half of the tile.
template <class T>
KERNEL_BOUNDS(wgmma::kThreads, 1)
void dense_dc_wgmma_kernel(const GRID_CONSTANT Dense p) {
#if defined(SIMT_HOPPER)
  if (is_listed(p)) return;
  constexpr simt::Major kMn = simt::Major::kMn;
  const Head& h = p.tma.head;
  const int count = *p.tma.rows.count, items = tiles_at_hand(p) * p.slices;
  const int half_tile = simt::cluster_rank() * wgmma::kRows;
  const float unit = p.unit[0];
  // at least one step; what it gives is not looked at where there are no rows
  const int steps = count > 0 ? (count + wgmma::kDepth - 1) / wgmma::kDepth : 1;
  wgmma::run<T, kMn, kMn>(
      p.g_map, p.e_map, items, steps,
      [&](int item, int step) -> wgmma::Place {
        const int k = step * wgmma::kDepth, tile = item / p.slices;
        return {tile * static_cast<int>(p.stride) + k, half_tile, k, item % p.slices * kTile};
      },
      [&](int item, Accumulators& acc) {
        const int64_t tile = first_tile_of(p) + item / p.slices;
        each_pair([&](int half, int block) {
          const int64_t v = tile * kTile + half_tile + wgmma::row_of(half);
          const int64_t d = item % p.slices * kTile + wgmma::column_of(block, 0);
          if (v >= h.V || d >= h.D) return;
          const float x = acc[4 * block + 2 * half], y = acc[4 * block + 2 * half + 1];
          store_pair(static_cast<T*>(p.out.dc) + v * h.D + d, count > 0 ? x * unit : 0.0f,
                     count > 0 ? y * unit : 0.0f);
        });
      });
#endif
}

// An item is a pair of row blocks and 256 columns of D. The last chunk rounds, to the rows of e.
template <class T>
KERNEL_BOUNDS(wgmma::kThreads, 1)
void dense_de_wgmma_kernel(const GRID_CONSTANT Dense p) {
#if defined(SIMT_HOPPER)
  if (is_listed(p)) return;
  constexpr simt::Major kK = simt::Major::kK, kMn = simt::Major::kMn;
  constexpr int kTileSteps = kTile / wgmma::kDepth;
  const Head& h = p.tma.head;
  const int count = *p.tma.rows.count, items = pairs_of(count) * p.slices;
  const int first_column = first_tile_of(p) * kTile;
  const float unit = p.unit[0];
  const bool first = p.chunk == 0, last = first_tile_of(p) + tiles_at_hand(p) == p.tiles;
  wgmma::run<T, kK, kMn>(
      p.g_rows_map, p.c_map, items, tiles_at_hand(p) * kTileSteps,
      [&](int item, int step) -> wgmma::Place {
        const int row = first_row_of(item / p.slices);
        const int in_tile = step % kTileSteps * wgmma::kDepth;
        return {in_tile, step / kTileSteps * static_cast<int>(p.stride) + row,
                first_column + step * wgmma::kDepth, item % p.slices * kTile};
      },
      [&](int item, Accumulators& acc) {
        const int64_t first_d = item % p.slices * kTile;
        UNROLL
        for (int half = 0; half < 2; ++half) {
          const int64_t row = first_row_of(item / p.slices) + wgmma::row_of(half);
          if (row >= count) continue;
          float* sum = p.de_sum + row * h.D;
          if (!first) {  // all loads at once: what lies outside of D is not stored
            UNROLL
            for (int block = 0; block < kTile / 8; ++block) {
              const int64_t d = first_d + wgmma::column_of(block, 0);
              acc[4 * block + 2 * half] += sum[d < h.D ? d : 0];
              acc[4 * block + 2 * half + 1] += sum[d < h.D ? d + 1 : 0];
            }
          }
          T* to = static_cast<T*>(p.out.de) + p.tma.rows.row[row] * h.D;
          UNROLL
          for (int block = 0; block < kTile / 8; ++block) {
            const int64_t d = first_d + wgmma::column_of(block, 0);
            const float x = acc[4 * block + 2 * half], y = acc[4 * block + 2 * half + 1];
            if (d >= h.D) continue;
            if (last) {
              store_pair(to + d, x * unit, y * unit);
            } else {
              store_pair(sum + d, x, y);
            }
          }
        }
      });
#endif
}

// kSumParts blocks per tile of the chunk.
template <class T>
KERNEL void dense_dbias_kernel(const GRID_CONSTANT Dense p) {
  if (is_listed(p)) return;
  const Head& h = p.tma.head;
  const int64_t tile = simt::block_idx() / kSumParts;
  const float sum =
      column_sum(static_cast<const T*>(p.strips) + tile * p.stride * kTile, *p.tma.rows.count);
  const int64_t position = (first_tile_of(p) + tile) * kTile +
                           simt::block_idx() % kSumParts * kSumColumns + simt::lane_idx();
  if (simt::warp_idx() > 0 || position >= h.V) return;
  p.out.dbias[position] = sum * p.unit[0] / h.map.scale;
}

// Strips of a forward, exp(s - max) ds/da T, become scale G / unit in place; a warp per row of a tile. The
// label's entry is made in fp32: of a rounded p near 1 nothing would be left of p - 1.
constexpr int kScaleRows = kPlanThreads / simt::kWarpSize;

template <class T>
KERNEL void scale_strips_kernel(const GRID_CONSTANT Dense p) {
  const Head& h = p.tma.head;
  const int64_t blocks = p.stride / kScaleRows, tile = simt::block_idx() / blocks;
  const int64_t row = simt::block_idx() % blocks * kScaleRows + simt::warp_idx();
  if (row >= *p.tma.rows.count) return;
  const Coefficients& c = p.row[row];
  const float unscale = h.map.scale * h.map.inv_t / p.unit[0], top = p.max[tile * h.N + row];
  const float factor = exp_of((top == -kInfinity ? 0.0f : top) - c.lse) * c.a * unscale;
  T* strip = static_cast<T*>(p.strips) + (tile * p.stride + row) * kTile;
  UNROLL
  for (int i = 2 * simt::lane_idx(); i < kTile; i += 2 * simt::kWarpSize) {
    store_pair(strip + i, widen(strip[i]) * factor, widen(strip[i + 1]) * factor);
  }
  const int64_t label = p.tma.rows.label[row] - tile * kTile;
  simt::sync_warp();
  if (simt::lane_idx() != 0 || label < 0 || label >= kTile) return;
  const float t = p.target[row] * h.map.t_over_cap;
  strip[label] = narrow<T>(c.at_label * (1.0f - t * t) * unscale);
}

// Bytes of strips in one chunk, and its tiles.
struct DenseChunk {
  int64_t stride, bytes;
  int tiles;

  DenseChunk(const Head& h, int64_t strip_bytes)
      : stride(ceil_div(h.N, wgmma::kRows) * wgmma::kRows) {
    const int64_t tile = stride * kTile * size_of(h.dtype), all = tiles_of(h.V);
    const int64_t fit = strip_bytes / tile;
    tiles = static_cast<int>(fit < 1 ? 1 : fit < all ? fit : all);
    bytes = tiles * tile;
  }
};

}  // namespace gemma_ext::cce::cuda
