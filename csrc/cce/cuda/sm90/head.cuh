// SPDX-License-Identifier: Apache-2.0
// The head as wgmma reads it: valid rows of e side by side, pairs of row blocks against tiles of c.
#pragma once

#include "cce/cuda/epilogue.h"
#include "cce/cuda/rows.cuh"
#include "common/cuda/tile_wgmma.h"

namespace gemma_ext::cce::cuda {

using wgmma::add_wgmma;

static_assert(wgmma::kColumns == kTile);

struct HeadTma {
  Head head;
  Rows rows;
  SmallTanh tanh;  // to s log2(e)
  void* e;         // [N, D] the valid rows, then zeros
  simt::TensorMap e_map, c_map;
};

inline bool by_wgmma(const Head& h) {
  return h.dtype != DType::kFloat32 && h.N > 0 && simt::device().hopper;
}

constexpr int kCopyThreads = 256;
constexpr int kPairRows = wgmma::kCluster * wgmma::kRows;

// Zeros without a source.
template <class T>
DEVICE void copy_row(T* to, const T* from, int64_t width) {
  for (int64_t d = 2 * simt::thread_idx(); d < width; d += 2 * kCopyThreads) {
    *reinterpret_cast<uint32_t*>(to + d) =
        from ? *reinterpret_cast<const uint32_t*>(from + d) : uint32_t{0};
  }
}

// A block per row.
template <class T>
KERNEL void gather_e_kernel(const GRID_CONSTANT HeadTma p) {
  const int64_t r = simt::block_idx(), D = p.head.D;
  const T* from = r < *p.rows.count
                      ? static_cast<const T*>(p.head.e) + int64_t{p.rows.row[r]} * p.head.e_stride
                      : nullptr;
  copy_row(static_cast<T*>(p.e) + r * D, from, D);
}

template <class T>
HeadTma gather_e(Launches& launches, const Head& h, const Rows& rows, void* e) {
  constexpr simt::Major kK = simt::Major::kK;
  HeadTma p{h, rows, SmallTanh(h.map.cap_over_t * kLog2E), e, {}, {}};
  launches.check(wgmma::make_map<T, kK>(&p.e_map, e, h.N, h.D, h.D));
  launches.check(wgmma::make_map<T, kK>(&p.c_map, h.c, h.V, h.D, h.c_stride));
  launches.add(gather_e_kernel<T>, h.N, kCopyThreads, 0, p);
  return p;
}

// Of a pair of row blocks, the one that this block of the cluster has.
DEVICE int first_row_of(int pair) { return pair * kPairRows + simt::cluster_rank() * wgmma::kRows; }
DEVICE int pairs_of(int count) { return (count + kPairRows - 1) / kPairRows; }

using Accumulators = float[wgmma::kColumns / 2];

// Two neighbours of a row of the accumulators at f(half, block): registers 4 block + 2 half and the next.
template <class F>
DEVICE void each_pair(F f) {
  UNROLL
  for (int half = 0; half < 2; ++half) {
    UNROLL
    for (int block = 0; block < kTile / 8; ++block) f(half, block);
  }
}

// Of the block's 128 rows of a tile those below `rows`, to [rows, kTile].
template <class T>
DEVICE void store_strips(const Accumulators& acc, T* to, int rows) {
  each_pair([&](int half, int block) {
    const int row = wgmma::row_of(half);
    if (row >= rows) return;
    store_pair(to + row * kTile + wgmma::column_of(block, 0), acc[4 * block + 2 * half],
               acc[4 * block + 2 * half + 1]);
  });
}

#if defined(SIMT_HOPPER)
// f(first row, tile, acc) with the products e.c in acc, for `items` items that at(item) turns into a pair of
// row blocks and a tile.
template <class T, class At, class F>
DEVICE void head_products(const HeadTma& p, int items, const At& at, const F& f) {
  constexpr simt::Major kK = simt::Major::kK;
  const int steps = static_cast<int>((p.head.D + wgmma::kDepth - 1) / wgmma::kDepth);
  wgmma::run<T, kK, kK>(
      p.e_map, p.c_map, items, steps,
      [&](int item, int step) -> wgmma::Place {
        const int k = step * wgmma::kDepth;
        const Raster place = at(item);
        return {k, first_row_of(place.row_block), k, place.tile * kTile};
      },
      [&](int item, Accumulators& acc) {
        const Raster place = at(item);
        f(first_row_of(place.row_block), place.tile, acc);
      });
}

// s log2(e) in place of e.c.
DEVICE void strip_logits(Accumulators& acc, const HeadTma& p, int64_t first_column) {
  const Head& h = p.head;
  const LogitMap& map = h.map;
  const bool capped = map.inv_cap > 0.0f;
  const float inverse = capped ? map.inv_cap : map.inv_t * kLog2E, unit = map.scale * inverse;
  UNROLL
  for (float& x : acc) x *= unit;
  if (h.bias) {
    const int last = static_cast<int>(h.V) - 1;
    UNROLL
    for (int i = 0; i < wgmma::kColumns / 2; ++i) {
      const int v = static_cast<int>(first_column) + wgmma::column_of(i / 4, i % 2);
      acc[i] += h.bias[v < last ? v : last] * inverse;  // outside is replaced below
    }
  }
  float largest = 0.0f;
  UNROLL
  for (const float x : acc) largest = fmaxf(largest, fabsf(x));
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
      if (first_column + wgmma::column_of(i / 4, i % 2) >= h.V) acc[i] = outside(map);
    }
  }
}
#endif

}  // namespace gemma_ext::cce::cuda
