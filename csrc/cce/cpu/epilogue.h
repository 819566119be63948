// SPDX-License-Identifier: Apache-2.0
// What happens to a strip of kTile raw products while it is in L1: logits, sums, gradients.
#pragma once

#include "../../common/cpu/vec.h"
#include "../contract.h"

namespace gemma_ext::cce::GEMMA_EXT_ISA {

using namespace gemma_ext::cpu::GEMMA_EXT_ISA;

constexpr float kInfinity = __builtin_inff();

// s in place of e.c; positions past the vocabulary become -inf.
GEMMA_EXT_INLINE void strip_logits(const LogitMap& map, const float* bias, int valid, float* s) {
  for (int i = 0; i < kTile; i += kLanes) {
    const Vf a = load(s + i) * map.scale + load(bias + i);
    store(s + i, map.inv_cap > 0 ? tanh(a * map.inv_cap) * map.cap_over_t : a * map.inv_t);
  }
  for (int i = valid; i < kTile; ++i) s[i] = -kInfinity;
}

struct StripSums {
  float max, sum, slope, square, weighted;
};

GEMMA_EXT_INLINE float strip_max(const float* s) {
  Vf m = load(s);
  for (int i = kLanes; i < kTile; i += kLanes) {
    const Vf x = load(s + i);
    m = x > m ? x : m;
  }
  return max(m);
}

// A NaN logit may hide from the maximum, never from the sum. The label's place in this tile, or -1, stays out
// of the sums: beside its 1 they would lose what a confident row's loss is made of.
GEMMA_EXT_INLINE StripSums strip_sums(const LogitMap& map, bool want_mean, int target, float* s) {
  const float top = strip_max(s), base = top == -kInfinity ? 0.0f : top;
  const float at_target = target >= 0 ? s[target] : 0.0f;
  if (target >= 0) s[target] = -kInfinity;
  Vf sum_e{}, sum_slope{}, sum_square{}, sum_s{};
  for (int i = 0; i < kTile; i += kLanes) {
    const Vf x = load(s + i), e = exp(x - base), t = x * map.t_over_cap;
    sum_e += e;
    sum_square += e * e;
    sum_slope += e > 0.0f ? e * (1.0f - t * t) : Vf{};
    if (want_mean) sum_s += e > 0.0f ? e * x : Vf{};
  }
  if (target >= 0) s[target] = at_target;
  return {top, sum(sum_e), sum(sum_slope), sum(sum_square), sum(sum_s)};
}

GEMMA_EXT_INLINE float strip_total(int valid, const float* s) {
  Vf total{};
  int i = 0;
  for (; i + kLanes <= valid; i += kLanes) total += load(s + i);
  float rest = 0;
  for (; i < valid; ++i) rest += s[i];
  return sum(total) + rest;
}

struct StripCoefficients {
  float lse, lse_low, a, at_label, mean, q, class_coef;
};

// G in place of s for one row; `target` is the label's place in this tile or -1.
GEMMA_EXT_INLINE void strip_gradient(const LogitMap& map, const StripCoefficients& c,
                                     const float* class_weight, int target, float* s) {
  const float at_target = target >= 0 ? s[target] : 0.0f;
  for (int i = 0; i < kTile; i += kLanes) {
    const Vf x = load(s + i), p = exp((x - c.lse) - c.lse_low), t = x * map.t_over_cap;
    const Vi outside = x == -kInfinity;
    Vf g = p * c.a;
    if (c.q != 0.0f) g += p * (x - c.mean) * c.q;
    if (c.class_coef != 0.0f) g += load(class_weight + i) * c.class_coef;
    g *= (1.0f - t * t) * map.inv_t;
    store(s + i, outside ? Vf{} : g);
  }
  if (target >= 0) {
    const float t = at_target * map.t_over_cap;
    float g = c.at_label;
    if (c.q != 0.0f)
      g += exp(set1((at_target - c.lse) - c.lse_low))[0] * (at_target - c.mean) * c.q;
    if (c.class_coef != 0.0f) g += class_weight[target] * c.class_coef;
    s[target] = g * (1.0f - t * t) * map.inv_t;
  }
}

}  // namespace gemma_ext::cce::GEMMA_EXT_ISA
