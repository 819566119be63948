// SPDX-License-Identifier: Apache-2.0
// Linear layers by segment, two launches:
//   shrink   low[m, r] = scale x_m . A_jr, j the loop of row m, rounded
//   expand   y[m, f] = x_m . W_f, then on over r: + low_m . B_jf in the same accumulators; bias, activation, one rounding
// A tile whose rows are of several loops runs over each of them, with rows of zeros in place of the others'.
#pragma once

#include "feature_tile.cuh"
#include "linear_engine.h"

namespace gemma_ext::depth_batching::cuda {

struct LinearParams {
  Linear call;
  void* low[kMostProjections];               // [n, low_stride]
  int64_t low_stride[kMostProjections];      // rank up to whole words
  int64_t first_tile[kMostProjections + 1];  // of features, or of ranks
};

// Rows of loop j, of the device's offsets whatever they are.
struct Segment {
  int64_t begin, end;
};
DEVICE Segment segment_of(const Linear& call, int64_t j, int64_t row0, int64_t rows) {
  if (!call.seg_offsets) return {row0, row0 + rows};
  const int64_t from = call.seg_offsets[j], to = call.seg_offsets[j + 1];
  return {from > row0 ? from : row0, to < row0 + rows ? to : row0 + rows};
}

template <class T>
DEVICE const T* row_at(const void* data, int64_t row, int64_t stride) {
  return static_cast<const T*>(data) + row * stride;
}

template <class Tile>
KERNEL_BOUNDS(Tile::kThreads, Tile::kBlocks)
void depth_shrink_kernel(LinearParams p) {
  using T = typename Tile::Type;
  const Linear& call = p.call;
  const int64_t row_tiles = ceil_div(call.n, Tile::kRows);
  const int64_t unit = simt::block_idx() / row_tiles;
  const int64_t row0 = simt::block_idx() % row_tiles * Tile::kRows;
  const int64_t rows = call.n - row0 < Tile::kRows ? call.n - row0 : Tile::kRows;
  int at = 0;
  while (unit >= p.first_tile[at + 1]) ++at;
  const Projection& own = call.projections[at];
  const int64_t r0 = (unit - p.first_tile[at]) * Tile::kFeatures;
  const int depth = static_cast<int>(call.D);
  for (int64_t j = 0; j < call.loops; ++j) {
    const Segment s = segment_of(call, j, row0, rows);
    if (s.begin >= s.end) continue;
    Tile tile;
    tile.clear();
    Lines<Tile>::multiply(
        tile, depth,
        [&](int line) {
          return r0 + line < own.rank ? row_at<T>(own.a, j * own.rank + r0 + line, own.a_stride)
                                      : nullptr;
        },
        [&](int line) {
          const int64_t row = row0 + line;
          return row >= s.begin && row < s.end ? row_at<T>(call.x, row, call.x_stride) + own.x_at
                                               : nullptr;
        });
    T* low = static_cast<T*>(p.low[at]);
    tile.each([&](int line, int m, float& x) {
      const int64_t row = row0 + m, r = r0 + line;
      if (row >= s.begin && row < s.end && r < p.low_stride[at])
        low[row * p.low_stride[at] + r] = narrow<T>(x * call.scale);
    });
  }
}

DEVICE float activated(Activation activation, float x) {
  if (activation == kSilu) return x / (1.0f + simt::exp2_approx(-1.44269504f * x));
  // 1 + tanh(u) = 2 / (1 + exp(-2 u))
  const float u = 0.797884561f * (x + 0.044715f * x * x * x);
  return x / (1.0f + simt::exp2_approx(-2.0f * 1.44269504f * u));
}

// A tile of gated projections holds as many features of the first as of the second behind them.
template <class Tile>
KERNEL_BOUNDS(Tile::kThreads, Tile::kBlocks)
void depth_expand_kernel(LinearParams p) {
  using T = typename Tile::Type;
  const Linear& call = p.call;
  const bool gated = call.activation != kNone;
  const int width = gated ? Tile::kFeatures / 2 : Tile::kFeatures;  // features of a projection
  const int64_t row_tiles = ceil_div(call.n, Tile::kRows);
  const int64_t unit = simt::block_idx() / row_tiles;
  const int64_t row0 = simt::block_idx() % row_tiles * Tile::kRows;
  const int64_t rows = call.n - row0 < Tile::kRows ? call.n - row0 : Tile::kRows;
  int at = 0;
  while (unit >= p.first_tile[at + 1]) ++at;
  const Projection &first = call.projections[at], &second = call.projections[gated ? 1 : at];
  const int64_t f0 = (unit - p.first_tile[at]) * width, features = first.features;
  const int depth = static_cast<int>(call.D);

  Tile tile;
  tile.clear();
  Lines<Tile>::multiply(
      tile, depth,
      [&](int line) {
        const bool other = line >= width;
        const int64_t f = f0 + line - (other ? width : 0);
        const Projection& own = other ? second : first;
        return f < features ? row_at<T>(own.weight, f, own.stride) : nullptr;
      },
      [&](int line) {
        return line < rows ? row_at<T>(call.x, row0 + line, call.x_stride) + first.x_at : nullptr;
      });
  for (int half = 0; half <= static_cast<int>(gated); ++half) {
    const int which = at + half, begin = half * width;
    const Projection& own = half ? second : first;
    const int rank = static_cast<int>(own.rank);
    for (int64_t j = 0; rank > 0 && j < call.loops; ++j) {
      const Segment s = segment_of(call, j, row0, rows);
      if (s.begin >= s.end) continue;
      Lines<Tile>::multiply(
          tile, rank,
          [&](int line) {
            const int64_t f = f0 + line - begin;
            return line >= begin && line < begin + width && f < features
                       ? row_at<T>(own.b, j * features + f, own.b_stride)
                       : nullptr;
          },
          [&](int line) {
            const int64_t row = row0 + line;
            return row >= s.begin && row < s.end ? row_at<T>(p.low[which], row, p.low_stride[which])
                                                 : nullptr;
          });
    }
  }

  float* s_sums =
      simt::shared<float>();  // [rows][features], so that rows of y are written as they lie
  tile.each([&](int line, int m, float& x) { s_sums[m * Tile::kFeatures + line] = x; });
  simt::sync_block();
  int64_t column = f0;
  for (int q = 0; q < at; ++q) column += call.projections[q].features;
  const T *bias = static_cast<const T*>(first.bias), *other = static_cast<const T*>(second.bias);
  const int64_t y_width = p.call.y_width;
  for (int i = simt::thread_idx(); i < Tile::kRows * width; i += Tile::kThreads) {
    const int m = i / width, f = i % width;
    if (m >= rows || f0 + f >= features) continue;
    const float* sums = s_sums + m * Tile::kFeatures + f;
    float y = sums[0] + (bias ? widen(bias[f0 + f]) : 0.0f);
    if (gated)
      y = activated(call.activation, y) * (sums[width] + (other ? widen(other[f0 + f]) : 0.0f));
    static_cast<T*>(call.y)[(row0 + m) * y_width + column + f] = narrow<T>(y);
  }
}

}  // namespace gemma_ext::depth_batching::cuda
