// SPDX-License-Identifier: Apache-2.0
// The CUDA engine's norms and linear layers, as engine.h has its calls. Rows of every matrix are whole 16-byte words
// at multiples of 16 bytes, zero behind their columns.
#pragma once

#include "../linear.h"
#include "engine.h"

namespace gemma_ext::depth_batching::cuda {

int64_t workspace(const Gather&);
int64_t workspace(const Scatter&);
int64_t workspace(const Linear&);

Status run(const Gather&, void* memory, Stream);
Status run(const Scatter&, void* memory, Stream);
Status run(const Linear&, void* memory, Stream);

}  // namespace gemma_ext::depth_batching::cuda
