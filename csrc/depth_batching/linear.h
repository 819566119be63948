// SPDX-License-Identifier: Apache-2.0
// Norms and linear layers of rows at different loops: what an engine takes.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"

namespace gemma_ext::depth_batching {

struct NormRule {
  float eps;
  bool plus_one;  // 1 + weight
};

// out[i] = norm(bank[slots[i]]) weight; 0 where the slot is negative.
struct Gather {
  const void* bank;  // [S, D] contiguous
  DType bank_type;
  int64_t S, D, n;
  const int32_t* slots;  // [n]
  const void* weight;    // [D]
  DType type;            // of weight
  NormRule norm;
  void* out;  // [n, D]
  DType out_type;
};

// bank[slots[i]] += y[i], or norm(y[i]) weight; then next[i] as Gather gives it.
struct Scatter {
  void* bank;  // [S, D] contiguous
  DType bank_type;
  int64_t S, D, n;
  const int32_t* slots;  // [n], all different; negative: left out
  const void* y;         // [n, D]
  int64_t y_stride;
  DType y_type;
  const void* weight;  // [D] or null
  DType weight_type;
  const void* next_weight;  // [D] or null
  DType next_type;          // of next_weight and next
  NormRule norm;
  void* next;  // [n, D]
};

// y = x W^T + bias + scale (x A_j^T) B_j^T; of one dtype.
struct Projection {
  const void* weight;  // [features, D], rows `stride` elements apart
  const void* bias;    // [features] or null
  const void *a,
      *b;  // [loops, rank, D], [loops, features, rank], their rows a_stride and b_stride apart; or null
  int64_t features, rank, stride, a_stride, b_stride;
  int64_t x_at;  // element of a row of x where its own x begins
};

constexpr int kMostProjections = 16;

enum Activation : int32_t { kNone, kGeluTanh, kSilu };  // of two projections: act(first) second

// Sums are float; x A^T, times scale, is rounded to the type. Each is a chain over K that its row and column alone
// decide.
struct Linear {
  const void* x;  // [n, D], rows `x_stride` elements apart
  int64_t x_stride, n, D, loops;
  DType type;
  Projection projections[kMostProjections];
  int count;
  const int32_t* seg_offsets;  // [loops + 1]; null: all rows are of one loop, or all ranks are 0
  float scale;
  Activation activation;
  void* y;          // [n, y_width]
  int64_t y_width;  // at least width_of
};

// Elements of a row of results.
inline int64_t width_of(const Linear& call) {
  if (call.activation != kNone) return call.projections[0].features;
  int64_t width = 0;
  for (int p = 0; p < call.count; ++p) width += call.projections[p].features;
  return width;
}

}  // namespace gemma_ext::depth_batching
