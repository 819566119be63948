// SPDX-License-Identifier: Apache-2.0
// The CUDA engine's head, noise, gates and shortlist, as engine.h has its calls; matrices as linear_engine.h has them.
#pragma once

#include "../head.h"
#include "engine.h"

namespace gemma_ext::depth_batching::cuda {

int64_t workspace(const HeadExit&);
int64_t workspace(const Noise&);
int64_t workspace(const Gate&);
int64_t workspace(const Shortlist&);

Status run(const HeadExit&, void* memory, Stream);
Status run(const Noise&, void* memory, Stream);
Status run(const Gate&, void* memory, Stream);
Status run(const Shortlist&, void* memory, Stream);

}  // namespace gemma_ext::depth_batching::cuda
