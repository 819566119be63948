// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cuda/launches.h"
#include "engine.h"
#include "souping/element.h"

namespace gemma_ext::souping::cuda {

using gemma_ext::cuda::Arena;
using gemma_ext::cuda::Launches;
using gemma_ext::cuda::taking_turns;

// 64-bit atomics.
using Word = unsigned long long;

HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HOST_DEVICE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
HOST_DEVICE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

HOST_DEVICE constexpr int streams_of(bool variance, int models) { return variance ? 1 : models; }

HOST_DEVICE constexpr int sums_of(Sum sum, int models) {
  return sum == Sum::kGram ? models * (models + 1) / 2 : sum == Sum::kNorms ? 4 * models : models;
}

}  // namespace gemma_ext::souping::cuda
