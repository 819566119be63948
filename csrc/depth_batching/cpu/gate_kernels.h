// SPDX-License-Identifier: Apache-2.0
// Exits that need no head.
#pragma once

#include "head_table.h"
#include "rows.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {
namespace {

// sigmoid of z, and of -z without what 1 - sigmoid would lose
GEMMA_EXT_INLINE float sigmoid(float z) {
  return 1.0f / (1.0f + exp(set1(-z > 88.0f ? 88.0f : -z))[0]);
}

template <class T>
float gate_score(const Gate& call, int64_t row) {
  const T* h = static_cast<const T*>(call.h) + row * call.D;
  Vf first{}, second{}, third{};
  if (call.mode == kGate || call.mode == kHazard) {
    const T* w = static_cast<const T*>(call.weight);
    each_vector(h, call.D, [&](int64_t i, Vf v, int n) {
      first += v * (n == kLanes ? load_row(w + i) : some_of(w + i, n));
    });
    const float z = sum(first) + (call.bias ? *call.bias : 0.0f);
    if (call.mode == kGate) return sigmoid(z);
    call.after[row] = call.survival[row] * sigmoid(-z);
    return 1.0f - call.after[row];
  }
  const T* p = static_cast<const T*>(call.previous) + row * call.D;
  each_vector(h, call.D, [&](int64_t i, Vf v, int n) {
    const Vf before = n == kLanes ? load_row(p + i) : some_of(p + i, n);
    const Vf step = call.mode == kCosine ? before : v - before;
    first += v * v;
    second += step * step;
    third += v * before;
  });
  const float norms = __builtin_sqrtf(sum(first)), other = __builtin_sqrtf(sum(second));
  return call.mode == kCosine ? sum(third) / (norms * other) : other / norms;
}

void gate_row(const Gate& call, int64_t row) {
  with_type(call.type, [&](auto like) {
    const float score = gate_score<decltype(like)>(call, row), limit = call.threshold[row];
    call.scores[row] = score;
    const bool leaves = call.mode == kLatentDiff ? leaves_below(score, limit, call.strict)
                                                 : leaves_above(score, limit, call.strict);
    call.exits[row] = leaves || (call.last && call.last[row]);
  });
}

}  // namespace
}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
