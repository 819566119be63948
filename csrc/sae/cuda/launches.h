// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cuda/launches.h"
#include "engine.h"

namespace gemma_ext::sae::cuda {

using gemma_ext::cuda::Arena;
using gemma_ext::cuda::by_dtype;
using gemma_ext::cuda::Launches;
using gemma_ext::cuda::lesser;
using gemma_ext::cuda::narrow;
using gemma_ext::cuda::taking_turns;
using gemma_ext::cuda::widen;

constexpr int kThreads = 256, kWarps = kThreads / simt::kWarpSize;

HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HOST_DEVICE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
HOST_DEVICE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace gemma_ext::sae::cuda
