// SPDX-License-Identifier: Apache-2.0
// Kernels over the entries of one token: decode and dots.
#pragma once

#include "products_vec.h"

namespace gemma_ext::sae::GEMMA_EXT_ISA {
namespace {

// Rows that are read side by side, and those whose dots are each a register.
constexpr int kFlight = 16, kDots = kLanes == 16 ? 16 : 8;

GEMMA_EXT_INLINE int64_t begin_of(const List& l, int64_t n) {
  return l.offsets ? l.offsets[n] : n * l.K;
}
GEMMA_EXT_INLINE int64_t end_of(const List& l, int64_t n) {
  return l.offsets ? l.offsets[n + 1] : n * l.K + (l.counts ? l.counts[n] : l.K);
}

// sum += v_u row_u, one after the other; two vectors of a row at once, which is how lines of memory come.
template <int kCount, class T>
GEMMA_EXT_INLINE void add_some(float* sum, const T* const* row, const float* v, int64_t D) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= D; c += 2 * kLanes) {
    Vf a = load(sum + c), b = load(sum + c + kLanes);
    for (int u = 0; u < kCount; ++u) {
      prefetch_ahead(row[u] + c);
      a += v[u] * load_row(row[u] + c);
      b += v[u] * load_row(row[u] + c + kLanes);
    }
    store(sum + c, a);
    store(sum + c + kLanes, b);
  }
  each_vector(c, D, [&](int64_t at, auto read) __attribute__((always_inline)) {
    Vf s = load(sum + at);
    for (int u = 0; u < kCount; ++u) s += v[u] * read(row[u] + at);
    store(sum + at, s);
  });
}

// sum += v W of the entries of `list`, count of them; `order` names their places, or they lie side by side.
template <class T>
void add_entries(const List& list, const Table& weight, const int32_t* order, int64_t from,
                 int64_t count, int64_t D, float* sum) {
  const T* rows[2 * kFlight];
  float v[2 * kFlight];
  int held = 0;
  const auto flush = [&](int some) {
    for (int u = some; u < held; ++u) prefetch_head(rows[u]);
    int u = some == kFlight ? kFlight : 0;
    if (u) add_some<kFlight>(sum, rows, v, D);
    for (; u + 4 <= some; u += 4) add_some<4>(sum, rows + u, v + u, D);
    for (; u < some; ++u) add_some<1>(sum, rows + u, v + u, D);
    for (u = some; u < held; ++u) {
      rows[u - some] = rows[u];
      v[u - some] = v[u];
    }
    held -= some;
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = order ? order[i] : from + i;
    if (list.values[at] == 0) continue;
    v[held] = list.values[at];
    rows[held++] = row_of<T>(weight, list.indices[at]);
    if (held == 2 * kFlight) flush(kFlight);
  }
  if (held > kFlight) flush(kFlight);
  flush(held);
}

GEMMA_EXT_INLINE void start_sum(const float* bias, int64_t D, float* sum) {
  each_vector(D, [&](int64_t c, auto read) { store(sum + c, bias ? read(bias + c) : Vf{}); });
}

void decode(const Decode& call, int64_t first, int64_t last, Scratch& s) {
  const int64_t D = call.D;
  float* sum_row = floats_of(s, kSum, D);
  float* target = call.target.data ? floats_of(s, kRow, D) : nullptr;
  for (int64_t n = first; n < last; ++n) {
    start_sum(call.bias, D, sum_row);
    const int64_t begin = begin_of(call.list, n), count = end_of(call.list, n) - begin;
    with_type(call.weight.type, [&](auto like) {
      add_entries<decltype(like)>(call.list, call.weight, nullptr, begin, count, D, sum_row);
    });
    if (target) {
      widen_row(call.target, n, D, target);
      Vf square{};
      each_vector(D, [&](int64_t c, auto read) {
        // what lies behind D is not looked at: it may be anything in sum_row
        const Vf r = read(target + c) - read(sum_row + c);
        store(sum_row + c, r);
        square += r * r;
      });
      call.squared[n] = sum(square);
    }
    store_row(row_at(call.out, call.weight.type, n, D), call.weight.type, sum_row, D);
  }
}

// <g, row_u>, each in its own sum.
template <int kCount, class T>
GEMMA_EXT_INLINE void dot_some(const float* g, const T* const* row, int64_t D, float* dot) {
  Vf s[kCount] = {};
  each_pair(
      D,
      [&](int64_t c) __attribute__((always_inline)) {
        for (int u = 0; u < kCount; ++u) prefetch_ahead(row[u] + c);
      },
      [&](int64_t c, auto read) __attribute__((always_inline)) {
        const Vf x = load(g + c);
        for (int u = 0; u < kCount; ++u) s[u] += x * read(row[u] + c);
      });
  for (int u = 0; u < kCount; ++u) dot[u] = sum(s[u]);
}

template <class T>
void dot_entries(const List& list, const Table& weight, const float* g, int64_t begin, int64_t end,
                 int64_t D, float scale, float* dots) {
  const T* rows[kDots];
  int64_t i = begin;
  for (; i + kDots <= end; i += kDots) {
    for (int u = 0; u < kDots; ++u) rows[u] = row_of<T>(weight, list.indices[i + u]);
    for (int64_t next = i + kDots; next < end && next < i + 2 * kDots; ++next)
      prefetch_head(row_of<T>(weight, list.indices[next]));
    dot_some<kDots>(g, rows, D, dots + i);
  }
  for (; i < end; ++i) {
    rows[0] = row_of<T>(weight, list.indices[i]);
    dot_some<1>(g, rows, D, dots + i);
  }
  for (i = begin; i < end; ++i) dots[i] *= scale;
}

void dots(const DecodeBackward& call, int64_t first, int64_t last, Scratch& s) {
  float* g = floats_of(s, kRow, call.D);
  for (int64_t n = first; n < last; ++n) {
    widen_row(call.grad, n, call.D, g);
    with_type(call.weight.type, [&](auto like) {
      dot_entries<decltype(like)>(call.list, call.weight, g, begin_of(call.list, n),
                                  end_of(call.list, n), call.D, call.scale ? call.scale[n] : 1,
                                  call.d_values);
    });
  }
}

void column_sums(const DecodeBackward& call, int64_t first, int64_t last) {
  const int64_t width = last - first;
  float total[kColumns + kPad] = {};
  with_type(call.grad.type, [&](auto like) {
    for (int64_t n = 0; n < call.list.N; ++n) {
      const auto* row = row_of<decltype(like)>(call.grad, n) + first;
      const float scale = call.scale ? call.scale[n] : 1;
      each_vector(width, [&](int64_t c, auto read) {
        store(total + c, load(total + c) + scale * read(row + c));
      });
    }
  });
  memcpy(call.d_bias + first, total, width * sizeof(float));
}

}  // namespace
}  // namespace gemma_ext::sae::GEMMA_EXT_ISA
