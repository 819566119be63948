// SPDX-License-Identifier: Apache-2.0
// The CUDA engine's calls, without torch or a CUDA header.
//
// Every call only enqueues kernels on `stream`: no allocation, no synchronisation. Tables that lie on the
// host are read before run() returns; temporary memory is the caller's, as many bytes as workspace() of the
// same call says, 256-byte aligned.
#pragma once

#include "../contract.h"

namespace gemma_ext::souping::cuda {

using Stream = void*;  // cudaStream_t
using Status = int;    // cudaError_t

int64_t workspace(const Soup&);
int64_t workspace(const Merge&);
int64_t workspace(const Survey&);
int64_t workspace(const Sums&);
int64_t workspace(const GramRows&);
int64_t workspace(const Counts&);
int64_t workspace(const Apply&);
int64_t workspace(const Swarm&);
int64_t workspace(const GatherRows&);

Status run(const Soup&, void* memory, Stream);
Status run(const Merge&, void* memory, Stream);
Status run(const Survey&, void* memory, Stream);
Status run(const Sums&, void* memory, Stream);
Status run(const GramRows&, void* memory, Stream);
Status run(const Counts&, void* memory, Stream);
Status run(const Apply&, void* memory, Stream);
Status run(const Swarm&, void* memory, Stream);
Status run(const GatherRows&, void* memory, Stream);

const char* status_text(Status);

}  // namespace gemma_ext::souping::cuda
