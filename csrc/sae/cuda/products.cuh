// SPDX-License-Identifier: Apache-2.0
// p = x . w + bias of rows against tiles of features, eight of a row at a time, while they are in registers.
//   Visitor visitor(params, first row, first column, shared memory, warp)
//   Visitor::Row row(visitor, r)         what row r of the tile's 128 needs
//   Visitor::Eight eight(visitor, at)    what eight columns need: at.first + in_eight(i)
//   visitor.visit(eight, row, x)         x: their products; by the whole warp
//   visitor.end()
#pragma once

#include "common/cuda/raster.h"
#include "common/cuda/tile_mma.h"
#include "launches.h"
#include "sae/contract.h"

namespace gemma_ext::sae::cuda {

using gemma_ext::cuda::kRasterRows;
using gemma_ext::cuda::Raster;
using gemma_ext::cuda::raster;

constexpr int kBlockRows = 128;
constexpr int kEight = 8;

HOST_DEVICE constexpr int in_eight(int i) { return i / 2 * 8 + i % 2; }

// Where eights of a tile lie: features from `first` on, which is column `local` of the tile.
struct Columns {
  int first, local;
};

struct EncodeParams {
  Encoder encoder;
  int first_tile, tiles, row_blocks;
};

// Bias and scale of eight features; 0 and 1 outside of F.
struct EightFeatures {
  Columns at;
  float bias[kEight], scale[kEight];
  bool whole;

  DEVICE EightFeatures(const Encoder& e, const Columns& columns) : at(columns) {
    whole = at.first + in_eight(kEight - 1) < e.F;
    UNROLL
    for (int i = 0; i < kEight; ++i) {
      const int f = feature(i);
      const bool inside = whole || f < e.F;
      bias[i] = e.bias && inside ? e.bias[f] : 0.0f;
      scale[i] = e.scale && inside ? e.scale[f] : 1.0f;
    }
  }
  DEVICE bool inside(const Encoder& e, int i) const { return whole || feature(i) < e.F; }
  DEVICE int feature(int i) const { return at.first + in_eight(i); }
  DEVICE int column(int i) const { return at.local + in_eight(i); }
};

// What is NaN, summed again as it is: halves of an infinity, and of what bf16 rounds to one, are infinities of both
// signs.
template <class Row>
DEVICE void sum_again(mma::Tile<float>& tile, const Encoder& e, const Row& row, int first_column) {
  using Tile = mma::Tile<float>;
  constexpr int kElements = 64;
  for (int from = 0;;) {
    int at = kElements;
    UNROLL
    for (int i = kElements - 1; i >= 0; --i) {
      if (i >= from && tile.flat(i) != tile.flat(i)) at = i;
    }
    if (at == kElements) return;
    from = at + 1;
    const int64_t n = row(Tile::row_of(at / 16, at / 2 % 2));
    const int64_t f = int64_t{first_column} + Tile::column_of(at / 4 % 4, at % 2);
    if (n < 0 || f >= e.F) continue;
    const float* x = static_cast<const float*>(e.x) + n * e.x_stride;
    const float* w = static_cast<const float*>(e.weight) + f * e.weight_stride;
    float sum = 0.0f;
    for (int64_t k = 0; k < e.D && sum == sum; ++k) sum += x[k] * w[k];
    UNROLL
    for (int i = 0; i < kElements; ++i) {
      if (i == at) tile.flat(i) = sum;
    }
  }
}

// The eights of a tile of 128 columns by mma.sync. x and weight hold whole 16-byte words.
template <class T, class Row>
DEVICE void multiply_tile(mma::Tile<T>& tile, const Encoder& e, const Row& row, int first_column,
                          T* s_stages) {
  const T *x = static_cast<const T*>(e.x), *weight = static_cast<const T*>(e.weight);
  const int depth = static_cast<int>(e.D);
  tile.clear();
  tile.template multiply<simt::Major::kK, simt::Major::kK>(
      depth,
      [&](int line, int k) {
        const int64_t n = row(line);
        return n >= 0 && k < depth ? x + n * e.x_stride + k : nullptr;
      },
      [&](int line, int k) {
        const int64_t f = int64_t{first_column} + line;
        return f < e.F && k < depth ? weight + f * e.weight_stride + k : nullptr;
      },
      s_stages);
  if constexpr (std::is_same_v<T, float>) sum_again(tile, e, row, first_column);
}

template <class T, class Visitor>
DEVICE void visit_tile(mma::Tile<T>& tile, int first_column, Visitor& visitor) {
  using Tile = mma::Tile<T>;
  const int local = Tile::column(0);
  const typename Visitor::Eight eight(visitor, {first_column + local, local});
  UNROLL
  for (int r = 0; r < kEight; ++r) {
    const typename Visitor::Row row(visitor, Tile::row(r));
    float x[kEight];
    UNROLL
    for (int i = 0; i < kEight; ++i) x[i] = tile.at(r, i);
    visitor.visit(eight, row, x);
  }
  visitor.end();
}

// A block per tile of 128 x 128.
template <class T, class Params, class Visitor>
DEVICE void encode_by_mma(const Params& p) {
  const EncodeParams& q = p.encode;
  const Raster at = raster<kRasterRows>(simt::block_idx(), q.row_blocks, q.tiles);
  const int64_t first_row = int64_t{at.row_block} * kBlockRows;
  const int first_column = (q.first_tile + at.tile) * mma::kSide;
  T* s_stages = simt::shared<T>();
  mma::Tile<T> tile;
  multiply_tile(
      tile, q.encoder,
      [&](int line) { return first_row + line < q.encoder.N ? first_row + line : int64_t{-1}; },
      first_column, s_stages);
  Visitor visitor(p, first_row, first_column, simt::shared<uint8_t>(), simt::warp_idx());
  visit_tile(tile, first_column, visitor);
}

}  // namespace gemma_ext::sae::cuda
