// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cuda/launches.h"
#include "engine.h"

namespace gemma_ext::cce::cuda {

using gemma_ext::cuda::Arena;
using gemma_ext::cuda::by_dtype;
using gemma_ext::cuda::Launches;
using gemma_ext::cuda::lesser;
using gemma_ext::cuda::load_pair;
using gemma_ext::cuda::narrow;
using gemma_ext::cuda::Pair;
using gemma_ext::cuda::store_pair;
using gemma_ext::cuda::taking_turns;
using gemma_ext::cuda::widen;

}  // namespace gemma_ext::cce::cuda
