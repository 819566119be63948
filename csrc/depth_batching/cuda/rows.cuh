// SPDX-License-Identifier: Apache-2.0
// Rows of any storage type, a block each: sums in one order, RMS norms.
#pragma once

#include "launches.h"

namespace gemma_ext::depth_batching::cuda {

constexpr int kRowNormThreads = 256;
constexpr int kRowNormShared = kRowNormThreads / simt::kWarpSize * sizeof(float);

DEVICE float element(const void* x, DType type, int64_t i) {
  if (type == DType::kFloat32) return static_cast<const float*>(x)[i];
  if (type == DType::kBFloat16) return widen(static_cast<const simt::bf16*>(x)[i]);
  return widen(static_cast<const simt::f16*>(x)[i]);
}
DEVICE void set_element(void* x, DType type, int64_t i, float value) {
  if (type == DType::kFloat32)
    static_cast<float*>(x)[i] = value;
  else if (type == DType::kBFloat16)
    static_cast<simt::bf16*>(x)[i] = narrow<simt::bf16>(value);
  else
    static_cast<simt::f16*>(x)[i] = narrow<simt::f16>(value);
}

// Of all threads of the block, in their order; s_sums holds one float a warp.
DEVICE float block_sum(float x, float* s_sums) {
  x = warp_sum(x);
  if (simt::lane_idx() == 0) s_sums[simt::warp_idx()] = x;
  simt::sync_block();
  float total = 0;
  for (int w = 0; w < kRowNormThreads / simt::kWarpSize; ++w) total += s_sums[w];
  simt::sync_block();
  return total;
}

DEVICE float inverse_rms(const void* x, DType type, int64_t first, int64_t D, float eps,
                         float* s_sums) {
  float squares = 0;
  for (int64_t i = simt::thread_idx(); i < D; i += kRowNormThreads) {
    const float v = element(x, type, first + i);
    squares += v * v;
  }
  return 1.0f / sqrtf(block_sum(squares, s_sums) / static_cast<float>(D) + eps);
}

DEVICE float normed(float x, float inverse, float weight, bool plus_one) {
  return x * inverse * (plus_one ? 1.0f + weight : weight);
}

}  // namespace gemma_ext::depth_batching::cuda
