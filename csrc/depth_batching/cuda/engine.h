// SPDX-License-Identifier: Apache-2.0
// The CUDA engine's calls on rows and pages, without torch or a CUDA header.
//
// Every call only enqueues kernels on `stream`: no allocation, no synchronisation, the same launches whatever the
// data, so it may be captured into a graph. Temporary memory is the caller's, as many bytes as workspace() of the
// same call says, 256-byte aligned. A row that leads out of the tensors is not written; its result is NaN.
#pragma once

#include "../contract.h"

namespace gemma_ext::depth_batching::cuda {

using Stream = void*;  // cudaStream_t
using Status = int;    // cudaError_t

int64_t workspace(const Compact&);
int64_t workspace(const RopeWrite&);
int64_t workspace(const Attention&);
int64_t workspace(const Copy&);

Status run(const Compact&, void* memory, Stream);
Status run(const RopeWrite&, void* memory, Stream);
Status run(const Attention&, void* memory, Stream);
Status run(const Copy&, void* memory, Stream);

const char* status_text(Status);

}  // namespace gemma_ext::depth_batching::cuda
