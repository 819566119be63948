// SPDX-License-Identifier: Apache-2.0
// The head: what becomes of 256 logits of a row while they are in cache.
#pragma once

#include "head_table.h"
#include "linear_kernels.h"
#include "noise_kernels.h"
#include "norm_kernels.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kHeadRows = 128;  // of a strip

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// x of a row, rounded to T where a norm is taken, as floats or as products with T take it.
template <class T, class Put>
void head_row(const Head& head, int64_t row, Scratch& s, const Put& put_row) {
  with_type(head.h_type, [&](auto like) {
    using H = decltype(like);
    const H* h = static_cast<const H*>(head.h) + row * head.h_stride;
    if constexpr (kSame<H, T>) {
      if (!head.norm_weight) return put_row(h);
    }
    T* rounded = static_cast<T*>(s.part(kWide, (head.D + kLanes) * sizeof(T)));
    const float inverse = inverse_rms(h, head.D, head.norm.eps);
    with_type(head.norm_type, [&](auto of_weight) {
      using W = decltype(of_weight);
      each_vector(static_cast<const W*>(head.norm_weight), head.D, [&](int64_t i, Vf w, int count) {
        const Vf v = count == kLanes ? load_row(h + i) : some_of(h + i, count);
        put_some(rounded + i, normed(v, inverse, w, head.norm.plus_one), count);
      });
    });
    put_row(static_cast<const T*>(rounded));
  });
}

void pack_head(const Head& head, int64_t row, const Packed& to, Scratch& s) {
  with_type(head.type, [&](auto like) {
    using T = decltype(like);
    using X = typename Operand<T>::X;
    head_row<T>(head, row, s, [&](const T* x) {
      pack_row(x, head.D, static_cast<X*>(to.at) + row * to.width, to.width);
    });
  });
}

float pack_wide(const Head& head, int64_t row, const Packed& to, Scratch& s) {
  float* wide = static_cast<float*>(to.at) + row * to.width;
  with_type(head.type, [&](auto like) {
    using T = decltype(like);
    head_row<T>(head, row, s, [&](const T* x) {
      each_vector(x, head.D, [&](int64_t i, Vf v, int count) { put_some(wide + i, v, count); });
    });
  });
  double squares = 0;
  for (int64_t i = 0; i < head.D; ++i) squares += double(wide[i]) * wide[i];
  return float(__builtin_sqrt(squares) * (1 + 0x1p-20));
}

// x . W of some rows and the tokens of a tile, strips [rows, kTile].
template <class W>
void tile_products(const Packed& x, int64_t row0, int64_t rows, const void* weight, int64_t stride,
                   int64_t D, int64_t id0, int64_t valid, float* strips) {
  using X = typename Operand<W>::X;
  for (int64_t column = 0; column < valid; column += kColumns) {
    const W* w = rows_of<W>(weight, id0 + column, stride);
    const int64_t columns = least(valid - column, kColumns);
    for (int64_t m = 0; m < rows; m += kRows)
      products<W>(
          least(rows - m, kRows), columns, D, static_cast<const X*>(x.at) + (row0 + m) * x.width,
          x.width, [&](int64_t f) { return w + f * stride; }, strips + m * kTile + column, kTile,
          false, row0 + m == 0 ? kColumnsAtOnce * stride : 0);
  }
}

// s in place of x . W; -inf behind the last token.
GEMMA_EXT_INLINE Vf cap_of(const Head& head, Vf a) {
  return head.cap > 0 ? tanh(a * (1.0f / head.cap)) * head.cap : a;
}

GEMMA_EXT_INLINE void tile_logits(const Head& head, const float* bias, int valid, float* s) {
  for (int i = 0; i < kTile; i += kLanes)
    store(s + i, cap_of(head, load(s + i) * head.scale + load(bias + i)));
  for (int i = valid; i < kTile; ++i) s[i] = -kInfinity;
}

GEMMA_EXT_INLINE Vf without_nan(Vf x) { return x == x ? x : set1(-kInfinity); }

GEMMA_EXT_INLINE float largest(const float* s) {
  Vf m = set1(-kInfinity);
  for (int i = 0; i < kTile; i += kLanes) {
    const Vf x = without_nan(load(s + i));
    m = x > m ? x : m;
  }
  return max(m);
}

GEMMA_EXT_INLINE int place_of(const float* s, float value) {
  int i = 0;
  while (!(s[i] == value)) ++i;
  return i;
}

GEMMA_EXT_INLINE void offer(BestList& list, const float* s, int64_t id0, int valid) {
  for (int i = 0; i < valid; i += kLanes) {
    if (list.full && !any(load(s + i) > list.limit)) continue;
    for (int j = i; j < i + kLanes && j < valid; ++j) {
      const float x = s[j] == s[j] ? s[j] : -kInfinity;
      if (list.full && !(x > list.limit)) continue;
      list.at[list.count++] = {x, int32_t(id0 + j)};
      if (list.count == 2 * list.wanted) keep_best(list);
    }
  }
}

void read_logits(const HeadTask& task, int64_t tile, int64_t row, float* s) {
  const HeadExit& call = *task.call;
  const int64_t id0 = tile * kTile, at = tile * call.head.n + row;
  const int valid = int(least(kTile, call.head.V - id0));
  Best& best = task.best[row];
  const float top = largest(s), base = top == -kInfinity ? 0.0f : top;
  const float heat = heat_of(call, row);
  const float inverse = heat > 0 ? 1.0f / heat : 0.0f;
  Vf sum_e{}, below{}, tempered{};
  for (int i = 0; i < kTile; i += kLanes) {
    const Vf x = load(s + i) - base, e = exp(x);
    sum_e += e;
    below -= e > 0.0f ? e * x : Vf{};
    if (heat > 0) tempered += exp(x * inverse);
  }
  task.sums.max[at] = top;
  task.sums.sum[at] = sum(sum_e);
  task.sums.below[at] = sum(below);
  if (task.sums.tempered) task.sums.tempered[at] = sum(tempered);
  if (task.lists) offer(task.lists[row], s, id0, valid);
  if (heat > 0) {
    alignas(64) float scores[kTile];
    tile_noise(noise_key(call.keys + 3 * row), id0, scores);
    for (int i = 0; i < kTile; i += kLanes)
      store(scores + i, load(s + i) * inverse + load(scores + i));
    const float score = largest(scores);
    if (score > best.score) {
      best.score = score;
      best.sample = int32_t(id0 + place_of(scores, score));
    }
  }
  if (!(top > best.second)) return;
  if (top > best.value) {
    const int place = place_of(s, top);
    s[place] = -kInfinity;
    const float second = largest(s);
    best.second = second > best.value ? second : best.value;
    best.value = top;
    best.id = int32_t(id0 + place);
  } else {
    best.second = top;
  }
}

void head_tile(const HeadTask& task, int64_t tile, Scratch& scratch) {
  const Head& head = task.call->head;
  const int64_t id0 = tile * kTile, valid = least(kTile, head.V - id0);
  alignas(64) float bias[kTile] = {};
  if (head.bias) memcpy(bias, head.bias + id0, valid * sizeof(float));
  float* strips = strip_of(scratch, kStrip, least(head.n, kHeadRows) * kTile);
  for (int64_t row0 = 0; row0 < head.n; row0 += kHeadRows) {
    const int64_t rows = least(head.n - row0, kHeadRows);
    with_type(head.type, [&](auto like) {
      tile_products<decltype(like)>(task.x, row0, rows, head.weight, head.w_stride, head.D, id0,
                                    valid, strips);
    });
    for (int64_t m = 0; m < rows; ++m) {
      tile_logits(head, bias, int(valid), strips + m * kTile);
      read_logits(task, tile, row0 + m, strips + m * kTile);
    }
  }
}

}  // namespace
}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
