// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cuda/launches.h"
#include "engine.h"

namespace gemma_ext::depth_batching::cuda {

using gemma_ext::cuda::Arena;
using gemma_ext::cuda::by_dtype;
using gemma_ext::cuda::Launches;
using gemma_ext::cuda::narrow;
using gemma_ext::cuda::widen;

HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

DEVICE float warp_sum(float x) {
  UNROLL
  for (int mask = 16; mask; mask /= 2) x += simt::shfl_xor(x, mask);
  return x;
}

}  // namespace gemma_ext::depth_batching::cuda
