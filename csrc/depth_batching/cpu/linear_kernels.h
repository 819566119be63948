// SPDX-License-Identifier: Apache-2.0
// Norms and linear layers: what runs inside one task.
#pragma once

#include "dot.h"
#include "linear_table.h"
#include "rows.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {
namespace {

int64_t packed_size(DType type) {
  int64_t bytes = 0;
  with_type(type, [&](auto like) { bytes = sizeof(typename Operand<decltype(like)>::X); });
  return bytes;
}

// n elements of a row in the storage type to `to`, zeros behind them up to `width`.
template <class T>
void pack_row(const T* from, int64_t n, typename Operand<T>::X* to, int64_t width) {
  using X = typename Operand<T>::X;
  if constexpr (sizeof(X) == sizeof(T))
    memcpy(to, from, n * sizeof(T));
  else
    each_vector(from, n, [&](int64_t i, Vf x, int count) { put_some(to + i, x, count); });
  memset(to + n, 0, (width - n) * sizeof(X));
}

void pack(const Linear& call, int64_t row, const Packed& to) {
  with_type(call.type, [&](auto like) {
    using T = decltype(like);
    using X = typename Operand<T>::X;
    pack_row(static_cast<const T*>(call.x) + row * call.x_stride, call.D,
             static_cast<X*>(to.at) + row * to.width, to.width);
  });
}

template <class T>
const T* rows_of(const void* data, int64_t row, int64_t stride) {
  return static_cast<const T*>(data) + row * stride;
}

void shrink(const Linear& call, const Projection& p, int64_t loop, int64_t row0, int64_t row1,
            int64_t column0, int64_t column1, const Packed& x, const Packed& low, Scratch& s) {
  with_type(call.type, [&](auto like) {
    using T = decltype(like);
    using X = typename Operand<T>::X;
    const T* a = rows_of<T>(p.a, loop * p.rank + column0, p.a_stride);
    const int64_t columns = column1 - column0;
    float* strip = strip_of(s, kStrip, kRows * kColumns);
    for (int64_t row = row0; row < row1; row += kRows) {
      const int64_t rows = least(row1 - row, kRows);
      products<T>(
          rows, columns, call.D, static_cast<const X*>(x.at) + row * x.width, x.width,
          [&](int64_t f) { return a + f * p.a_stride; }, strip, kColumns, false);
      for (int64_t m = 0; m < rows; ++m) {
        X* to = static_cast<X*>(low.at) + (row + m) * low.width + column0;
        for (int64_t f = 0; f < columns; f += kLanes)
          put_rounded<T>(to + f, load(strip + m * kColumns + f) * call.scale,
                         int(least(columns - f, kLanes)));
      }
    }
  });
}

// Sums of some rows and columns of one projection, its bias among them.
template <class T>
void project(const Linear& call, const Projection& p, int64_t row0, int64_t rows, int64_t column,
             int64_t columns, const Packed& x, const Packed& low, float* strip) {
  using X = typename Operand<T>::X;
  const T* w = rows_of<T>(p.weight, column, p.stride);
  products<T>(
      rows, columns, call.D, static_cast<const X*>(x.at) + row0 * x.width, x.width,
      [&](int64_t f) { return w + f * p.stride; }, strip, kColumns, false,
      row0 == 0 ? kColumnsAtOnce * p.stride : 0);
  for (int64_t j = 0; p.rank > 0 && j < call.loops; ++j) {
    const int64_t begin = most(call.seg_offsets[j], row0);
    const int64_t end = least(call.seg_offsets[j + 1], row0 + rows);
    if (begin >= end) continue;
    const T* b = rows_of<T>(p.b, j * p.features + column, p.b_stride);
    products<T>(
        end - begin, columns, p.rank, static_cast<const X*>(low.at) + begin * low.width, low.width,
        [&](int64_t f) { return b + f * p.b_stride; }, strip + (begin - row0) * kColumns, kColumns,
        true);
  }
  if (!p.bias) return;
  float bias[kColumns] = {};
  each_vector(rows_of<T>(p.bias, column, 1), columns,
              [&](int64_t i, Vf v, int count) { put_some(bias + i, v, count); });
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t f = 0; f < columns; f += kLanes) {
      float* at = strip + m * kColumns + f;
      store(at, load(at) + load(bias + f));
    }
}

GEMMA_EXT_INLINE Vf activated(Activation activation, Vf x) {
  if (activation == kSilu) {
    const Vf minus = -x;
    return x / (1.0f + exp(minus > 88.0f ? set1(88.0f) : minus));
  }
  constexpr float kRoot = 0.797884561f;  // sqrt(2 / pi)
  return 0.5f * x * (1.0f + tanh(kRoot * (x + 0.044715f * x * x * x)));
}

void expand(const Linear& call, int projection, int64_t column, const Packed& x, const Packed* low,
            Scratch& s) {
  with_type(call.type, [&](auto like) {
    using T = decltype(like);
    const bool gated = call.activation != kNone;
    const Projection& first = call.projections[projection];
    const int64_t columns = least(first.features - column, kColumns), width = call.y_width;
    float* strip = strip_of(s, kStrip, kRows * kColumns);
    float* other = gated ? strip_of(s, kOther, kRows * kColumns) : nullptr;
    int64_t at = column;
    for (int p = 0; p < projection; ++p) at += call.projections[p].features;
    for (int64_t row = 0; row < call.n; row += kRows) {
      const int64_t rows = least(call.n - row, kRows);
      project<T>(call, first, row, rows, column, columns, x, low[projection], strip);
      if (gated)
        project<T>(call, call.projections[1], row, rows, column, columns, x, low[1], other);
      for (int64_t m = 0; m < rows; ++m) {
        T* to = static_cast<T*>(call.y) + (row + m) * width + at;
        const float* sums = strip + m * kColumns;
        for (int64_t f = 0; f < columns; f += kLanes) {
          Vf y = load(sums + f);
          if (gated) y = activated(call.activation, y) * load(other + m * kColumns + f);
          put_some(to + f, y, int(least(columns - f, kLanes)));
        }
      }
    }
  });
}

}  // namespace
}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
