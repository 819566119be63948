// SPDX-License-Identifier: Apache-2.0
// Exact gradients by wgmma, a chunk of tiles at a time: all rows of a tile are gradient strips, side by
// side, so that TMA reads them along either index.
//   G as in strips.cuh,   dC = G^T E,   dE = sum over the chunks of G C
#pragma once

#include "cce/cuda/gradients.cuh"
#include "head.cuh"

namespace gemma_ext::cce::cuda {

// Strips of one chunk: [tiles at hand, stride, kTile], zero behind the last valid row of its 128.
struct Dense {
  HeadTma tma;
  Coefficients* row{};  // [N]
  float* unit{};        // [2]
  void* strips{};
  DeSums sums{};
  Gradients out{};
  const int* listed{};            // of the plan: nothing is done where lists are, or null
  const float *max{}, *target{};  // [tiles, N] and [N] of a forward that kept all strips, or null
  int64_t stride{};               // rows of a tile, whole blocks
  int tiles{}, slices{};
  int first_tile{}, tiles_at_hand{};  // of the chunk
  // operands of dC = G^T E and of dE = G C
  simt::TensorMap g_map{}, e_map{}, g_rows_map{}, c_map{};

  explicit Dense(const HeadTma& head) : tma(head) {}
};

DEVICE bool is_listed(const Dense& p) { return p.listed && *p.listed; }

#if defined(SIMT_HOPPER)
// kGeneral: rows have a q or a class coefficient.
template <class T, bool kGeneral>
DEVICE void dense_strips(const Dense& p) {
  if (is_listed(p)) return;
  const Head& h = p.tma.head;
  const Rows& rows = p.tma.rows;
  const int count = *rows.count, pairs = pairs_of(count), first_tile = p.first_tile;
  const float unscale = h.map.scale * h.map.inv_t / p.unit[0], t = h.map.t_over_cap * kLn2;
  head_products<T>(
      p.tma, pairs * p.tiles_at_hand,
      [&](int item) {
        const Raster at = raster<kRasterRows / wgmma::kCluster>(item, pairs, p.tiles_at_hand);
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
  const int count = *p.tma.rows.count, items = p.tiles_at_hand * p.slices;
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
        const int64_t tile = p.first_tile + item / p.slices;
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
template <class T, bool kLean>
KERNEL_BOUNDS(wgmma::kThreads, 1)
void dense_de_wgmma_kernel(const GRID_CONSTANT Dense p) {
#if defined(SIMT_HOPPER)
  if (is_listed(p)) return;
  constexpr simt::Major kK = simt::Major::kK, kMn = simt::Major::kMn;
  constexpr int kTileSteps = kTile / wgmma::kDepth;
  const Head& h = p.tma.head;
  const int count = *p.tma.rows.count, items = pairs_of(count) * p.slices;
  const int first_column = p.first_tile * kTile;
  const float unit = p.unit[0];
  wgmma::run<T, kK, kMn>(
      p.g_rows_map, p.c_map, items, p.tiles_at_hand * kTileSteps,
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
          const SumRow<T, kLean> sum(p.sums, p.tma.rows, p.out.de, h.D, row);
          if (p.first_tile > 0) {  // all loads at once: what lies outside of D is not stored
            UNROLL
            for (int block = 0; block < kTile / 8; ++block) {
              const int64_t d = first_d + wgmma::column_of(block, 0);
              const Pair before = sum.load(d < h.D ? d : 0);
              acc[4 * block + 2 * half] += before.x;
              acc[4 * block + 2 * half + 1] += before.y;
            }
          }
          T* to = static_cast<T*>(p.out.de) + p.tma.rows.row[row] * h.D;
          UNROLL
          for (int block = 0; block < kTile / 8; ++block) {
            const int64_t d = first_d + wgmma::column_of(block, 0);
            const float x = acc[4 * block + 2 * half], y = acc[4 * block + 2 * half + 1];
            if (d >= h.D) continue;
            if (p.first_tile + p.tiles_at_hand == p.tiles) {  // a flag would cost a register
              store_pair(to + d, x * unit, y * unit);
            } else {
              sum.store(d, x, y);
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
  const int64_t position = (p.first_tile + tile) * kTile +
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

// Tiles whose strips are at hand together: in the workspace or, lean, at the end of dC, of which nothing is
// written yet.
struct DenseChunks {
  int64_t stride, tile_bytes;       // of a tile's strips: rows and bytes
  int tiles, in_workspace;          // of the vocabulary; whose strips the workspace holds
  int64_t dc_bytes, dc_tile_bytes;  // room in dC, 0 where there is none

  DenseChunks(const Head& h, int64_t strip_bytes, bool in_dc)
      : stride(ceil_div(std::max<int64_t>(h.N, 1), wgmma::kRows) * wgmma::kRows),
        tile_bytes(stride * kTile * size_of(h.dtype)),
        tiles(static_cast<int>(tiles_of(h.V))),
        in_workspace(static_cast<int>(std::clamp<int64_t>(strip_bytes / tile_bytes, 1, tiles))),
        dc_bytes(in_dc ? h.V * h.D * size_of(h.dtype) : 0),
        dc_tile_bytes(kTile * h.D * size_of(h.dtype)) {}

  struct Chunk {
    int tiles;
    int64_t in_dc;  // bytes from its start to the strips, or 0
  };
  Chunk from(int first) const {
    constexpr int64_t kWord = 256;
    const int64_t unwritten = dc_bytes - first * dc_tile_bytes - kWord;
    const int64_t fit =
        std::min(kStripBytes / tile_bytes, unwritten / (tile_bytes + dc_tile_bytes));
    if (fit > in_workspace)
      return {static_cast<int>(fit), (dc_bytes - fit * tile_bytes) / kWord * kWord};
    return {std::min(in_workspace, tiles - first), 0};
  }
};

}  // namespace gemma_ext::cce::cuda
