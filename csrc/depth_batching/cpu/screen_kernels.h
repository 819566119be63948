// SPDX-License-Identifier: Apache-2.0
// The shortlist's screen: bounds of all logits from 8-bit codes, and the logits of a few.
#pragma once

#include "head_kernels.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {
namespace {

void screen_tile(const ScreenTask& task, int64_t tile, Scratch& scratch) {
  const Shortlist& call = *task.call;
  const Head& head = call.head;
  const int64_t id0 = tile * kTile, valid = least(kTile, head.V - id0);
  alignas(64) float bias[kTile] = {}, scale[kTile] = {}, slack[kTile] = {};
  if (head.bias) memcpy(bias, head.bias + id0, valid * sizeof(float));
  memcpy(scale, call.code_scale + id0, valid * sizeof(float));
  memcpy(slack, call.slack + id0, valid * sizeof(float));
  const float reach = head.scale < 0 ? -head.scale : head.scale;
  float* strips = strip_of(scratch, kStrip, least(head.n, kHeadRows) * kTile);
  for (int64_t row0 = 0; row0 < head.n; row0 += kHeadRows) {
    const int64_t rows = least(head.n - row0, kHeadRows);
    tile_products<int8_t>(task.x, row0, rows, call.codes, call.code_stride, head.D, id0, valid,
                          strips);
    for (int64_t m = 0; m < rows; ++m) {
      float* s = strips + m * kTile;
      const int64_t row = row0 + m, at = tile * head.n + row;
      const float width = reach * task.norms[row];
      alignas(64) float low[kTile];
      for (int i = 0; i < kTile; i += kLanes) {
        const Vf a = load(s + i) * load(scale + i) * head.scale + load(bias + i);
        const Vf size = a < 0.0f ? -a : a;
        // a bias is added here and in the head, and a width to it: each rounds by 2^-24 of the sum
        const Vf around = load(slack + i) * width + (size < kInfinity ? size * 0x1p-21f : Vf{});
        store(s + i, a + around);
        store(low + i, a - around);
      }
      for (int i = int(valid); i < kTile; ++i) s[i] = low[i] = -kInfinity;
      offer(task.lists[row], s, id0, int(valid));
      for (int i = 0; i < kTile; i += kLanes) {
        store(s + i, cap_of(head, load(s + i)));
        store(low + i, cap_of(head, load(low + i)));
      }
      for (int i = int(valid); i < kTile; ++i) s[i] = low[i] = -kInfinity;
      const float top = largest(s), base = top == -kInfinity ? 0.0f : top;
      Vf high_sum{}, low_sum{};
      for (int i = 0; i < kTile; i += kLanes) {
        high_sum += exp(load(s + i) - base);
        low_sum += exp(load(low + i) - base);
      }
      task.sums.max[at] = top;
      task.sums.sum[at] = sum(high_sum);
      task.sums.below[at] = sum(low_sum);
    }
  }
}

void exact_logits(const Head& head, const Packed& x, int64_t row, const Candidate* ids,
                  int64_t count, float* a, float* s) {
  with_type(head.type, [&](auto like) {
    using T = decltype(like);
    using X = typename Operand<T>::X;
    products<T>(
        1, count, head.D, static_cast<const X*>(x.at) + row * x.width, x.width,
        [&](int64_t f) { return rows_of<T>(head.weight, ids[f].id, head.w_stride); }, a, count,
        false);
  });
  for (int64_t i = 0; i < count; i += kLanes) {
    Vf bias{};
    const int n = int(least(count - i, kLanes));
    for (int j = 0; head.bias && j < n; ++j) bias[j] = head.bias[ids[i + j].id];
    const Vf raw = some_of(a + i, n) * head.scale + bias;
    put_some(a + i, raw, n);
    put_some(s + i, cap_of(head, raw), n);
  }
}

float capped(const Head& head, float a) { return cap_of(head, set1(a))[0]; }

}  // namespace
}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
