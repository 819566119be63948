// SPDX-License-Identifier: Apache-2.0
// The CUDA engine's state propagation, as engine.h has its calls; matrices as linear_engine.h has them.
#pragma once

#include "../propagate.h"
#include "engine.h"

namespace gemma_ext::depth_batching::cuda {

int64_t workspace(const Propagate&);
Status run(const Propagate&, void* memory, Stream);

}  // namespace gemma_ext::depth_batching::cuda
