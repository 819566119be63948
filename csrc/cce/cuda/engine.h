// SPDX-License-Identifier: Apache-2.0
// The CUDA engine's calls, without torch or a CUDA header.
//
// Every call only enqueues kernels on `stream`: no allocation, no synchronisation, the same launches
// whatever the data, so it may be captured into a graph. Temporary memory is the caller's, as many bytes
// as workspace() of the same call says (pointers may still be null there). A label outside [0, V) makes
// its nll NaN unless the head allows missing ones.
#pragma once

#include "../divergence.h"

namespace gemma_ext::cce::cuda {

using Stream = void*;  // cudaStream_t
using Status = int;    // cudaError_t

// Rows of e and c start at multiples of 16 bytes and hold whole multiples of 16 bytes; columns lie side
// by side.
struct Memory {
  void* workspace = nullptr;
  int64_t strip_bytes = 0;  // bound on the memory for gradient strips; at least one tile's are held
  int64_t plane_bytes = int64_t{16} << 20;  // the same of a lean forward's sums
};
constexpr int64_t kStripBytes = int64_t{256} << 20, kLeanStripBytes = int64_t{56} << 20;

int64_t workspace(const Forward&, const Memory&);
int64_t workspace(const Backward&, const Memory&);
int64_t workspace(const Fused&, const Memory&);
int64_t workspace(const DivergenceForward&, const Memory&);
int64_t workspace(const DivergenceBackward&, const Memory&);
inline int64_t workspace(const Scale&, const Memory&) { return 0; }

// The most bytes that a step holds at a time beside its inputs and gradients, results of the forward included.
int64_t step_bytes(const Forward&, const Backward&, const Memory&);
int64_t step_bytes(const Fused&, const Memory&);

Status run(const Forward&, const Memory&, Stream);
Status run(const Backward&, const Memory&, Stream);
Status run(const Fused&, const Memory&, Stream);
Status run(const Scale&, const Memory&, Stream);
Status run(const DivergenceForward&, const Memory&, Stream);  // both heads of one dtype
Status run(const DivergenceBackward&, const Memory&, Stream);

const char* status_text(Status);

}  // namespace gemma_ext::cce::cuda
