// SPDX-License-Identifier: Apache-2.0
// Where the entries of a list lie.
#pragma once

#include "words.cuh"

namespace gemma_ext::sae::cuda {

constexpr float kNan = __builtin_nanf("");

struct Span {
  int64_t begin, end;
};

// Of token n.
DEVICE Span entries_of(const List& list, int64_t n) {
  if (list.offsets) return {list.offsets[n], list.offsets[n + 1]};
  return {n * list.K, n * list.K + (list.counts ? list.counts[n] : list.K)};
}

// The token of entry e, and whether e belongs to it or to nobody.
DEVICE bool token_of(const List& list, int64_t e, int64_t& n) {
  if (!list.offsets) {
    n = e / list.K;
    return !list.counts || e - n * list.K < list.counts[n];
  }
  int64_t low = 0, high = list.N + 1;  // the last offset that is not above e
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (list.offsets[middle] <= e ? low : high) = middle;
  }
  n = low;
  return low < list.N;
}

DEVICE bool is_feature(const List& list, int index) {
  return static_cast<uint32_t>(index) < static_cast<uint32_t>(list.F);
}

constexpr int kStaged = 512;  // entries in shared memory
constexpr int kAhead = 8;     // rows on their way

struct Staged {
  int index[kStaged];
  float value[kStaged];
};

// Entry e at place i. One that names no feature makes sums NaN.
DEVICE void stage_entry(const List& list, int64_t e, int i, Staged& s) {
  const int index = list.indices[e];
  const bool valid = is_feature(list, index);
  s.index[i] = valid ? index : 0;
  s.value[i] = valid ? list.values[e] : kNan;
}

// sum += v W[i] of the staged entries, the rows of W from `column` on.
template <class T, int kV>
DEVICE void add_rows(const Staged& s, int count, const T* column, int64_t stride,
                     float (&sum)[kV]) {
  NO_UNROLL
  for (int j = 0; j < count; j += kAhead) {
    Few<T, kV> row[kAhead];
    float v[kAhead];
    UNROLL
    for (int a = 0; a < kAhead; ++a) {
      v[a] = j + a < count ? s.value[j + a] : 0.0f;
      if (v[a] != 0.0f) row[a] = Few<T, kV>::load(column + s.index[j + a] * stride);
    }
    UNROLL
    for (int a = 0; a < kAhead; ++a) {
      if (v[a] == 0.0f) continue;
      UNROLL
      for (int i = 0; i < kV; ++i) sum[i] += v[a] * row[a].at(i);
    }
  }
}

// Sums of four numbers over the warp: lanes 8 i to 8 i + 7 get the i-th.
DEVICE float four_sums(const float (&x)[4]) {
  const bool upper = simt::lane_idx() & 16, odd = simt::lane_idx() & 8;
  const float even = (upper ? x[2] : x[0]) + simt::shfl_xor(upper ? x[0] : x[2], 16);
  const float next = (upper ? x[3] : x[1]) + simt::shfl_xor(upper ? x[1] : x[3], 16);
  float sum = (odd ? next : even) + simt::shfl_xor(odd ? even : next, 8);
  UNROLL
  for (int step = 4; step > 0; step /= 2) sum += simt::shfl_xor(sum, step);
  return sum;
}

}  // namespace gemma_ext::sae::cuda
