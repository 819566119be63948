// SPDX-License-Identifier: Apache-2.0
// Kernels over the tokens of one feature: its row of the weight stays in L1 while rows of the gradient stream by, for
// the dots and the sum together.
#pragma once

#include "products_rows.h"

namespace gemma_ext::sae::GEMMA_EXT_ISA {
namespace {

template <int kValue>
struct Size {
  static constexpr int value = kValue;
};

template <bool kWithDots, int kCount, class T>
GEMMA_EXT_INLINE void visit_some(const float* w, const T* const* g, const float* c, int64_t D,
                                 float* total, float* dot) {
  Vf s[kCount] = {};
  each_pair(
      D,
      [&](int64_t at) __attribute__((always_inline)) {
        for (int u = 0; u < kCount; ++u) prefetch_ahead(g[u] + at);
      },
      [&](int64_t at, auto read) __attribute__((always_inline)) {
        const Vf row = kWithDots ? load(w + at) : Vf{};
        Vf t = load(total + at);
        for (int u = 0; u < kCount; ++u) {
          const Vf x = read(g[u] + at);
          if (kWithDots) s[u] += row * x;
          t += c[u] * x;
        }
        store(total + at, t);
      });
  if (kWithDots)
    for (int u = 0; u < kCount; ++u) dot[u] = sum(s[u]);
}

template <bool kWithDots, class T>
void visit(const Segments& call, const Entry* entries, int64_t count, const float* w,
           float* total) {
  constexpr int kMost = kWithDots ? kDots : kFlight;
  const T* g[kMost];
  float c[kMost], scale[kMost], dot[kMost];
  const auto some = [&](int64_t i, auto size) {
    constexpr int kSome = decltype(size)::value;
    for (int u = 0; u < kSome; ++u) {
      const Entry e = entries[i + u];
      g[u] = row_of<T>(call.grad, e.token);
      scale[u] = call.scale ? call.scale[e.token] : 1;
      c[u] = call.list->values[e.at] * scale[u];
    }
    for (int64_t next = i + kSome; next < count && next < i + kSome + kMost; ++next)
      prefetch_head(row_of<T>(call.grad, entries[next].token));
    visit_some<kWithDots, kSome>(w, g, c, call.D, total, dot);
    if (kWithDots)
      for (int u = 0; u < kSome; ++u) call.dots[entries[i + u].at] = dot[u] * scale[u];
  };
  int64_t i = 0;
  for (; i + kMost <= count; i += kMost) some(i, Size<kMost>());
  for (; i + 4 <= count; i += 4) some(i, Size<4>());
  for (; i < count; ++i) some(i, Size<1>());
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
