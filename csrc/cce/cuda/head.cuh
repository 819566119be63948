// SPDX-License-Identifier: Apache-2.0
// Products of a block of rows of e with half a tile of c: what forward and backward share. Rows and columns are named by indices in shared memory; -1 stands for a row of zeros.
#pragma once

#include "epilogue.h"
#include "rows.cuh"

namespace gemma_ext::cce::cuda {

constexpr int kBlockRows = mma::kSide;
constexpr int kHalf = mma::kSide;  // columns of one product; a tile of the vocabulary has two
static_assert(kTile == 2 * kHalf);

// Where set, room for [tiles, rows, kTile] in the head's dtype: exp(s - max) ds/da T of compact rows, zero
// behind the last; a 16-bit head on Hopper only.
struct KeptStrips {
  void* strips = nullptr;
  int64_t rows = 0;
  float *max = nullptr, *target = nullptr;  // [tiles, N], [N]
};

// The forward, which may keep its strips.
Status forward(const Forward&, const Memory&, const KeptStrips&, Stream);

// Of all strips, the most that are worth lists on Hopper: on an H200, N 8192, D 2304, V 256000, a step that
// keeps .18 takes 48 ms and an exact one 67.
constexpr double kListedShare = 0.25;

template <class T>
constexpr int kMmaBlocks =
    sizeof(T) == 2 ? 2 : 1;  // per SM; the split product needs more registers

// Behind the stages of the product.
template <class T>
struct SharedHead {
  int *row, *label;  // [128] row of e, its label
  int* column;       // [128] vocabulary ids
  float *bias, *weight;

  DEVICE SharedHead() {
    row = simt::shared<int>(mma::Tile<T>::kSharedBytes);
    label = row + kBlockRows;
    column = label + kBlockRows;
    bias = reinterpret_cast<float*>(column + kHalf);
    weight = bias + kHalf;
  }
};
template <class T>
constexpr int kHeadSharedBytes = mma::Tile<T>::kSharedBytes + 5 * mma::kSide * 4;

// Rows first..first + 127 of `list` (null: the valid rows themselves), which has `count` entries.
template <class T>
DEVICE void name_rows(const SharedHead<T>& s, const Rows& rows, const int* list, int64_t first,
                      int64_t count) {
  const int t = simt::thread_idx();
  if (t < kBlockRows) {
    const bool valid = first + t < count;
    const int64_t at = !valid ? 0 : list ? list[first + t] : first + t;
    s.row[t] = valid ? rows.row[at] : -1;
    s.label[t] = valid ? rows.label[at] : -1;
  }
}

template <class T>
DEVICE void name_columns(const SharedHead<T>& s, const Head& h, int64_t first) {
  const int t = simt::thread_idx() - kBlockRows;
  if (t >= 0 && t < kHalf) {
    const int64_t id = first + t;
    const bool inside = id < h.V;
    s.column[t] = inside ? static_cast<int>(id) : -1;
    s.bias[t] = inside && h.bias ? h.bias[id] : 0.0f;
    s.weight[t] = inside && h.class_weight ? h.class_weight[id] : 0.0f;
  }
}

// Logits of the named rows and columns. The caller has synchronised after naming them.
template <class T>
DEVICE void head_logits(mma::Tile<T>& tile, const SharedHead<T>& s, const Head& h, int64_t first) {
  const T *e = static_cast<const T*>(h.e), *c = static_cast<const T*>(h.c);
  const int depth = static_cast<int>(h.D);
  tile.clear();
  tile.template multiply<simt::Major::kK, simt::Major::kK>(
      depth,
      [&](int line, int k) {
        const int row = s.row[line];
        return row >= 0 && k < depth ? e + int64_t{row} * h.e_stride + k : nullptr;
      },
      [&](int line, int k) {
        const int id = s.column[line];
        return id >= 0 && k < depth ? c + int64_t{id} * h.c_stride + k : nullptr;
      },
      simt::shared<T>());
  logits(tile, h.map, s.bias, s.column, first + kHalf <= h.V);
}

}  // namespace gemma_ext::cce::cuda
