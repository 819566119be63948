// SPDX-License-Identifier: Apache-2.0
// Logits of the head: from a product, and the best two of several.
#pragma once

#include "cce/cuda/epilogue.h"
#include "head_engine.h"
#include "launches.h"

namespace gemma_ext::depth_batching::cuda {

constexpr float kLeast = -__builtin_huge_valf();
constexpr int kHeadTile = 128;  // tokens

// The two largest and where the first is; the lowest id among equal ones.
struct TopTwo {
  float first, second;
  int32_t id;
};
DEVICE TopTwo merge(const TopTwo& a, const TopTwo& b) {
  const bool swap =
      b.first > a.first || (b.first == a.first && b.id >= 0 && (a.id < 0 || b.id < a.id));
  const TopTwo &best = swap ? b : a, &other = swap ? a : b;
  return {best.first, other.first > best.second ? other.first : best.second, best.id};
}
DEVICE TopTwo warp_top(TopTwo x) {
  UNROLL
  for (int mask = 1; mask < simt::kWarpSize; mask *= 2)
    x = merge(x, {simt::shfl_xor(x.first, mask), simt::shfl_xor(x.second, mask),
                  simt::shfl_xor(x.id, mask)});
  return x;
}

DEVICE float capped(const Head& head, float a) {
  if (!(head.cap > 0.0f)) return a;
  const float u = a / head.cap;
  return head.cap * (fabsf(u) > 1.0f ? cce::cuda::tanh_any(u) : cce::cuda::SmallTanh(1.0f)(u));
}

// Of a token inside the vocabulary.
DEVICE float logit_of(const Head& head, int64_t id, float product) {
  return capped(head, product * head.scale + (head.bias ? head.bias[id] : 0.0f));
}

}  // namespace gemma_ext::depth_batching::cuda
