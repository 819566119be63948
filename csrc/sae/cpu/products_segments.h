// SPDX-License-Identifier: Apache-2.0
// Kernels over the tokens of one feature: its row of the weight stays in L1 while rows of the gradient stream by, for
// the dots and the sum together.
#pragma once

#include "products_rows.h"

namespace gemma_ext::sae::GEMMA_EXT_ISA {
namespace {

template <bool kDots, int kCount, class T>
GEMMA_EXT_INLINE void visit_some(const float* w, const T* const* g, const float* c, int64_t D,
                                 float* total, float* dot) {
  Vf s[kCount] = {};
  each_vector(D, [&](int64_t at, auto read) __attribute__((always_inline)) {
    const Vf row = kDots ? load(w + at) : Vf{};
    Vf t = load(total + at);
    for (int u = 0; u < kCount; ++u) {
      const Vf x = read(g[u] + at);
      if (kDots) s[u] += row * x;
      t += c[u] * x;
    }
    store(total + at, t);
  });
  if (kDots)
    for (int u = 0; u < kCount; ++u) dot[u] = sum(s[u]);
}

template <bool kDots, class T>
void visit(const Segments& call, const Entry* entries, int64_t count, const float* w,
           float* total) {
  const T* g[kFlight];
  float c[kFlight], scale[kFlight], dot[kFlight];
  const auto take = [&](int64_t i, int some) {
    for (int u = 0; u < some; ++u) {
      const Entry e = entries[i + u];
      g[u] = row_of<T>(call.grad, e.token);
      scale[u] = call.scale ? call.scale[e.token] : 1;
      c[u] = call.list->values[e.at] * scale[u];
    }
  };
  const auto put = [&](int64_t i, int some) {
    if (kDots)
      for (int u = 0; u < some; ++u) call.dots[entries[i + u].at] = dot[u] * scale[u];
  };
  int64_t i = 0;
  for (; i + kFlight <= count; i += kFlight) {
    take(i, kFlight);
    for (int64_t next = i + kFlight; next < count && next < i + 2 * kFlight; ++next)
      prefetch_row(row_of<T>(call.grad, entries[next].token));
    visit_some<kDots, kFlight>(w, g, c, call.D, total, dot);
    put(i, kFlight);
  }
  for (; i + 2 <= count; i += 2) {
    take(i, 2);
    visit_some<kDots, 2>(w, g, c, call.D, total, dot);
    put(i, 2);
  }
  if (i < count) {
    take(i, 1);
    visit_some<kDots, 1>(w, g, c, call.D, total, dot);
    put(i, 1);
  }
}

GEMMA_EXT_INLINE void clear(float* sum, int64_t D) {
  memset(sum, 0, padded_width(D) * sizeof(float));
}

void finish(const Segments& call, int64_t feature, float* total, void* row, Scratch& s) {
  if (call.unit_norm) {
    float* w = floats_of(s, kRow, call.D);
    widen_row(call.weight, feature, call.D, w);
    Vf along{}, square{};
    each_vector(call.D, [&](int64_t c, auto read) {
      const Vf x = load(w + c);
      along += x * read(total + c);
      square += x * x;
    });
    const float norm = sum(square), share = norm > 0 ? sum(along) / norm : 0;
    each_vector(call.D,
                [&](int64_t c, auto) { store(total + c, load(total + c) - share * load(w + c)); });
  }
  store_row(row, call.type, total, call.D);
}

void segment(const Segments& call, int64_t feature, const Entry* entries, int64_t count, void* row,
             float* partial, Scratch& s) {
  float* total = partial ? partial : floats_of(s, kSum, call.D);
  clear(total, call.D);
  float* w = nullptr;
  if (call.dots) {
    w = floats_of(s, kRow, call.D);
    widen_row(call.weight, feature, call.D, w);
  }
  with_type(call.grad.type, [&](auto like) {
    call.dots ? visit<true, decltype(like)>(call, entries, count, w, total)
              : visit<false, decltype(like)>(call, entries, count, w, total);
  });
  if (!partial) finish(call, feature, total, row, s);
}

void join(const Segments& call, int64_t feature, float* partial, int64_t parts, void* row,
          Scratch& s) {
  const int64_t step = padded_width(call.D);
  for (int64_t p = 1; p < parts; ++p)
    for (int64_t c = 0; c < step; c += kLanes)
      store(partial + c, load(partial + c) + load(partial + p * step + c));
  finish(call, feature, partial, row, s);
}

}  // namespace
}  // namespace gemma_ext::sae::GEMMA_EXT_ISA
