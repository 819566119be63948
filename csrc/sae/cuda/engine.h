// SPDX-License-Identifier: Apache-2.0
// The CUDA engine's calls, without torch or a CUDA header.
//
// Every call only enqueues kernels on `stream`: no allocation, no synchronisation, the same launches whatever the
// data, so it may be captured into a graph. Those with an Allocate wait once for the size that they ask for.
// Temporary memory is the caller's, as many bytes as workspace() of the same call says, 256-byte aligned.
#pragma once

#include <functional>

#include "../contract.h"
#include "../steer.h"

namespace gemma_ext::sae::cuda {

using Stream = void*;  // cudaStream_t
using Status = int;    // cudaError_t
using AllocateEntries = std::function<Entries(int64_t nnz)>;
using AllocateBytes = std::function<void*(int64_t bytes)>;
using AllocateRows = std::function<TouchedRows(int64_t touched)>;

// Of a nested dictionary.
constexpr int kMostWidths = 64;

// Rows of x and weight start at multiples of 16 bytes and hold whole multiples of 16 bytes.
int64_t workspace(const TopK&);
int64_t workspace(const GroupMax&);
int64_t workspace(const BatchTopK&);
int64_t workspace(const Threshold&);
int64_t workspace(const Decode&);
int64_t workspace(const DecodeBackward&);
int64_t workspace(const Scatter&);
int64_t workspace(const Nested&);
int64_t workspace(const NestedBackward&);
int64_t workspace(const Steer&);

Status run(const TopK&, void* memory, Stream);
Status run(const GroupMax&, void* memory, Stream);
Status run(const BatchTopK&, void* memory, Stream);
Status run(const Threshold&, void* memory, Stream);
// `more` temporary memory, where rows are long.
Status run(const Threshold&, void* memory, Stream, const AllocateEntries&,
           const AllocateBytes& more);
Status run(const Decode&, void* memory, Stream);
Status run(const DecodeBackward&, void* memory, Stream);
Status run(const DecodeBackward&, void* memory, Stream, const AllocateRows&);
Status run(const Scatter&, void* memory, Stream);
Status run(const Nested&, void* memory, Stream);
Status run(const NestedBackward&, void* memory, Stream);
Status run(const Steer&, void* memory, Stream);

const char* status_text(Status);

}  // namespace gemma_ext::sae::cuda
