// SPDX-License-Identifier: Apache-2.0
// Kernels of nested reconstructions: a token's entries by level.
#pragma once

#include "products_segments.h"

namespace gemma_ext::sae::GEMMA_EXT_ISA {
namespace {

constexpr int least(int a, int b) { return a < b ? a : b; }

// The first level that holds an index, `levels` where none does.
GEMMA_EXT_INLINE int64_t level_of(const Nested& call, int64_t index) {
  int64_t m = 0;
  while (m < call.levels && index >= call.widths[m]) ++m;
  return m;
}

// A token's entries by level, in the order of the list within one.
struct ByLevel {
  int32_t* order;  // places in the list, level after level
  int32_t* first;  // [levels + 1] into it

  ByLevel(const Nested& call, int64_t n, Scratch& s) {
    const int64_t begin = begin_of(call.list, n), count = end_of(call.list, n) - begin;
    first = static_cast<int32_t*>(s.part(kOrder, (call.levels + 2 + count) * sizeof(int32_t)));
    order = first + call.levels + 2;
    if (!call.widths) {
      for (int64_t m = 0; m <= call.levels; ++m) first[m] = int32_t(m < count ? m : count);
      for (int64_t i = 0; i < count; ++i) order[i] = int32_t(begin + i);
      return;
    }
    memset(first, 0, (call.levels + 2) * sizeof(int32_t));
    const int32_t* index = call.list.indices + begin;
    for (int64_t i = 0; i < count; ++i) ++first[level_of(call, index[i]) + 1];
    for (int64_t m = 0; m <= call.levels; ++m) first[m + 1] += first[m];
    // counting up moves every start to the start of the next level
    for (int64_t i = 0; i < count; ++i)
      order[first[level_of(call, index[i])]++] = int32_t(begin + i);
    for (int64_t m = call.levels; m > 0; --m) first[m] = first[m - 1];
    first[0] = 0;
  }
};

void nested(const Nested& call, int64_t from, int64_t last, Scratch& s) {
  const int64_t D = call.D;
  float *total = floats_of(s, kSum, D), *target = floats_of(s, kRow, D);
  for (int64_t n = from; n < last; ++n) {
    const ByLevel by(call, n, s);
    start_sum(call.bias, D, total);
    widen_row(call.target, n, D, target);
    for (int64_t m = 0; m < call.levels; ++m) {
      float& squared = call.squared[n * call.levels + m];
      if (m > 0 && by.first[m] == by.first[m + 1]) {
        squared = (&squared)[-1];
        continue;
      }
      with_type(call.weight.type, [&](auto like) {
        add_entries<decltype(like)>(call.list, call.weight, by.order + by.first[m], 0,
                                    by.first[m + 1] - by.first[m], D, total);
      });
      Vf square{};
      each_vector(D, [&](int64_t c, auto read) {
        const Vf r = read(total + c) - read(target + c);
        square += r * r;
      });
      squared = sum(square);
    }
  }
}

// The dots of up to kDots entries with the suffix sum, and total -= v W.
template <class T>
GEMMA_EXT_INLINE void take_off(const NestedBackward& call, const int32_t* places, int count,
                               const float* suffix, float* total) {
  const Nested& f = call.nested;
  const T *row[kDots], *added[kDots];
  float off[kDots], dot[kDots];
  int adds = 0;
  for (int u = 0; u < count; ++u) {
    row[u] = row_of<T>(f.weight, f.list.indices[places[u]]);
    const float v = f.list.values[places[u]];
    if (v == 0) continue;
    off[adds] = -v;
    added[adds++] = row[u];
  }
  if (call.d_values) {
    int u = count == kDots ? kDots : 0;
    if (u) dot_some<kDots>(suffix, row, f.D, dot);
    for (; u < count; ++u) dot_some<1>(suffix, row + u, f.D, dot + u);
    for (u = 0; u < count; ++u) call.d_values[places[u]] = dot[u];
  }
  int u = adds == kDots ? kDots : 0;
  if (u) add_some<kDots>(total, added, off, f.D);
  for (; u < adds; ++u) add_some<1>(total, added + u, off + u, f.D);
}

// From the last level to the first: x^_m by taking off what the level added, the suffix sum on the way.
template <class T>
void walk_down(const NestedBackward& call, int64_t n, const ByLevel& by, float* total,
               const float* target, float* suffix) {
  const Nested& f = call.nested;
  const int64_t D = f.D, step = padded_width(D);
  for (int64_t m = f.levels - 1; m >= 0; --m) {
    const float slope = 2 * call.d_squared[n * f.levels + m];
    float* here = suffix + m * step;
    const float* above = m + 1 < f.levels ? here + step : nullptr;
    each_vector(D, [&](int64_t c, auto read) {
      const Vf r = load(total + c) - read(target + c);
      store(here + c, slope * r + (above ? load(above + c) : Vf{}));
    });
    for (int32_t i = by.first[m]; i < by.first[m + 1]; i += kDots)
      take_off<T>(call, by.order + i, least(by.first[m + 1] - i, kDots), here, total);
  }
}

void nested_rows(const NestedBackward& call, int64_t from, int64_t last, float* suffixes,
                 Scratch& s) {
  const Nested& f = call.nested;
  const int64_t D = f.D, step = padded_width(D);
  float *total = floats_of(s, kSum, D), *target = floats_of(s, kRow, D);
  for (int64_t n = from; n < last; ++n) {
    const ByLevel by(f, n, s);
    float* suffix = suffixes + (n - from) * f.levels * step;
    start_sum(f.bias, D, total);
    widen_row(f.target, n, D, target);
    with_type(f.weight.type, [&](auto like) {
      add_entries<decltype(like)>(f.list, f.weight, by.order, 0, by.first[f.levels], D, total);
      walk_down<decltype(like)>(call, n, by, total, target, suffix);
    });
    if (!call.d_target) continue;
    float* negative = floats_of(s, kOther, D);
    each_vector(D, [&](int64_t c, auto) { store(negative + c, -load(suffix + c)); });
    store_row(row_at(call.d_target, f.target.type, n, D), f.target.type, negative, D);
  }
}

void nested_segment(const float* const* suffix, const float* v, int64_t count, int64_t D,
                    float* total) {
  int64_t i = 0;
  for (; i + kFlight <= count; i += kFlight) add_some<kFlight>(total, suffix + i, v + i, D);
  for (; i < count; ++i) add_some<1>(total, suffix + i, v + i, D);
}

}  // namespace
}  // namespace gemma_ext::sae::GEMMA_EXT_ISA
