// SPDX-License-Identifier: Apache-2.0
// Tiles of a vocabulary and strips of rows against them: products, and gradients from strips.
#pragma once

#include <string.h>

#include "../../common/cpu/gemm.h"
#include "kernels.h"

namespace gemma_ext::cce::GEMMA_EXT_ISA {

using namespace gemma_ext::cpu::GEMMA_EXT_ISA;

static_assert(kTile == kDepth, "strips are read in place as rows of A");
constexpr int kSlices = kTile / kSlice;

enum Part {
  kPacked,
  kRaw,
  kBlockA,
  kStrips,
  kPackedA,
  kBlockB,
  kSums,
  kSmall,
  kTeacherPacked,
  kTeacherStrips
};

template <class T>
T* scratch(Scratch& s, Part part, int64_t count) {
  return static_cast<T*>(s.part(part, count * sizeof(T)));
}

struct Tile {
  int64_t first;  // position of its first column
  int valid;      // columns inside the vocabulary
};

GEMMA_EXT_INLINE Tile tile_at(const Problem& p, int64_t tile) {
  const int64_t first = tile * kTile;
  return {first, int(least(kTile, p.V - first))};
}

inline void gather(const Tile& tile, const float* from, float* to) {
  for (int i = 0; i < kTile; ++i) to[i] = from && i < tile.valid ? from[tile.first + i] : 0.0f;
}

// C[tiles]^T, each ready for the product.
template <class T>
T* pack_tiles(const Problem& p, int64_t tile0, int64_t tile1, Part part, Scratch& s) {
  const int64_t size = depth<T>(p.D) * kTile;
  T* packed = scratch<T>(s, part, (tile1 - tile0) * size);
  T* spare = scratch<T>(s, kRaw, kLanes * depth<T>(p.D));
  for (int64_t t = tile0; t < tile1; ++t) {
    const Tile tile = tile_at(p, t);
    const auto id = [&](int v) { return v < tile.valid ? tile.first + v : -1; };
    pack_rows<T>(p.c, kTile, id, packed + (t - tile0) * size, spare);
  }
  return packed;
}

// The rows of e in place as the A of a product, null where they have to be copied: their addresses are
// not evenly spaced, or a multiple of 4 KiB apart, which leaves them few sets of the caches.
template <class T, class RowAt>
const T* rows_in_place(const Problem& p, int64_t rows, RowAt row_at) {
  const int64_t first = p.rows[row_at(0)], stride = p.e.row_stride * sizeof(T);
  const bool whole = rows == whole_rows<T>(rows) && p.D == depth<T>(p.D);
  const bool adjacent = p.rows[row_at(rows - 1)] - first == rows - 1;
  if (!kTiled<T> || !is_plain<T>(p.e) || !whole || !adjacent || stride % 4096 == 0) return nullptr;
  return static_cast<const T*>(p.e.data) + first * p.e.row_stride;
}

// Raw products of at most kBlockRows ascending rows with `tiles` packed tiles -> [rows, tiles, kTile].
template <class T, class RowAt>
float* products(const Problem& p, const T* packed, int64_t tiles, int64_t rows, RowAt row_at,
                Part part, Scratch& s) {
  T* block = scratch<T>(s, kBlockA, kBlockRows<T> * kTile);
  float* out = scratch<float>(s, part, kBlockRows<T> * tiles * kTile);
  const T* e = rows_in_place<T>(p, rows, row_at);
  const int64_t d = depth<T>(p.D);
  for (int64_t k = 0; k < p.D; k += kTile) {
    const int64_t step = least(kTile, p.D - k);
    for (int64_t r = 0; !e && r < rows; ++r) {
      load_row<T>(p.e, p.rows[row_at(r)], k, step, block + r * kTile);
      for (int64_t i = step; i < depth<T>(step); ++i) put(block + r * kTile + i, 0.0f);
    }
    const Rows<T> a = e ? Rows<T>(e + k, p.e.row_stride) : Rows<T>(block);
    const T* next = e && k + kTile < p.D ? e + k + kTile : nullptr;
    block_product<T>(whole_rows<T>(rows), int(tiles) * kSlices, step, a, packed + k * kSlice,
                     d * kSlice, out, tiles * kTile, k > 0, next);
  }
  return out;
}

inline int target_in(const Problem& p, const Tile& tile, int64_t row) {
  const int64_t at = p.label[row] - tile.first;
  return p.label[row] >= 0 && at >= 0 && at < kTile ? int(at) : -1;
}

// At most kBlockRows strips as the A of a product over their columns.
template <class T, class S>
const T* widen_strips(const S* strips, int64_t rows, Scratch& s) {
  if constexpr (sizeof(T) == sizeof(S)) {
    return strips;
  } else {
    T* wide = scratch<T>(s, kBlockA, kBlockRows<T> * kTile);
    for (int64_t i = 0; i < rows * kTile; i += kLanes) store(wide + i, load(strips + i));
    return wide;
  }
}

// kColumns columns of at most kTile rows of m, ready for the product.
template <class T, class RowAt>
T* pack_block(const Matrix& m, int64_t column, int64_t rows, RowAt row_at, Scratch& s) {
  T* packed = scratch<T>(s, kBlockB, kTile * kColumns);
  T* spare = scratch<T>(s, kRaw, 2 * kColumns);
  pack_columns<T, kColumns>(m, column, rows, row_at, packed, spare);
  return packed;
}

// dC of one tile from the gradient strips [rows, kTile] of its rows.
template <class T, class S, class RowAt>
void write_dc(const GradTask& task, int64_t index, const S* strips, int64_t rows, RowAt row_at,
              Scratch& s) {
  const Problem& p = *task.problem;
  const Tile tile = tile_at(p, index);
  T* a = scratch<T>(s, kPackedA, (rows + kTile - 1) / kTile * kTransposedBlock<T>);
  pack_transposed(strips, rows, a);
  float* sums = scratch<float>(s, kSums, kTile * kColumns);
  for (int64_t column = 0; column < p.D; column += kColumns) {
    const int64_t width = least(kColumns, p.D - column);
    for (int64_t k = 0; k < rows; k += kTile) {
      const int64_t step = least(kTile, rows - k);
      const T* b =
          pack_block<T>(p.e, column, step, [&](int64_t r) { return p.rows[row_at(k + r)]; }, s);
      block_product<T, Layout::kGroups>(kTile, kColumns / kSlice, step,
                                        a + k / kTile * kTransposedBlock<T>, b, kSlice * kTile,
                                        sums, kColumns, k > 0);
    }
    if (rows == 0) memset(sums, 0, kTile * kColumns * sizeof(float));
    for (int v = 0; v < tile.valid; ++v) {
      const float* x = sums + v * kColumns;
      const int64_t at = (tile.first + v) * p.D + column;
      if (task.dc_sum) {
        float* to = task.dc_sum + at;
        if (task.dc_accumulate)
          for (int64_t i = 0; i < width; ++i) to[i] += x[i];
        else
          memcpy(to, x, width * sizeof(float));
      } else {
        store_row(static_cast<char*>(task.dc) + at * size_of(p.c.dtype), p.c.dtype, x, width);
      }
    }
  }
}

inline void write_dbias(const GradTask& task, int64_t index, const float* sums) {
  const Problem& p = *task.problem;
  const Tile tile = tile_at(p, index);
  for (int v = 0; v < tile.valid; ++v) {
    float& to = task.dbias[tile.first + v];
    to = (task.dc_accumulate ? to : 0.0f) + sums[v];
  }
}

// Gradients of a strip: added to those of the bias, and in units of e.c where they wait for the products.
template <class S>
GEMMA_EXT_INLINE void keep_strip(const float* g, float scale, float* bias_sums, S* slot) {
  for (int i = 0; i < kTile; i += kLanes) {
    const Vf x = load(g + i);
    store(bias_sums + i, load(bias_sums + i) + x);
    store(slot + i, x * scale);
  }
}

}  // namespace gemma_ext::cce::GEMMA_EXT_ISA
