// SPDX-License-Identifier: Apache-2.0
// The one way from device code to the hardware, with two backends: PTX under nvcc, and under a host
// compiler a checker that runs the same kernel as fibers (README.md: what each function is, what the
// checker sees and what it cannot).
//
//   template <int kTile>
//   KERNEL void row_sum_kernel(RowSumParams p) {          // one parameter, passed by value
//     float* s_tile = simt::shared<float>();              // 1024-byte aligned
//     ...
//     simt::sync_block();
//   }
//   simt::launch(row_sum_kernel<64>, grid, block, shared_bytes, stream, params);
//
// A kernel names no intrinsic and no PTX. Indices are one-dimensional ints, a block is a whole number
// of warps, pointers to shared memory are ordinary pointers. A parameter that holds a TensorMap is
// declared `const GRID_CONSTANT Params p`.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define KERNEL __global__
#define KERNEL_BOUNDS(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define DEVICE __device__ __forceinline__
#define DEVICE_CALL static __device__ __noinline__  // long, and wanted in several places
#define HOST_DEVICE __host__ __device__ __forceinline__
#define GRID_CONSTANT __grid_constant__
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
#define SIMT_PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(count) SIMT_PRAGMA(unroll count)
#else
#define KERNEL inline
#define KERNEL_BOUNDS(threads, blocks) inline
#define DEVICE inline
#define DEVICE_CALL inline
#define HOST_DEVICE inline
#define GRID_CONSTANT
#define UNROLL
#define NO_UNROLL
#define UNROLL_BY(count)
#endif

// Where the instructions of sm_90a may stand: its own device pass, and the host backend.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SIMT_HOPPER 1
#endif

namespace gemma_ext::simt {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// 16-bit operands of the tensor cores; a fragment register holds two, the lower index in the low half.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct Device {
  int multiprocessors;
  bool hopper;  // runs sm_90a
};

// In shared memory, 8-byte aligned.
struct Mbarrier {
  uint64_t opaque;
};

enum class Swizzle { kNone, k128B };

// Which index of a wgmma operand is contiguous in shared memory.
enum class Major { kK, kMn };

// Byte offset inside a tile of 128-byte rows whose base is 1024-byte aligned: the 128B swizzle of TMA
// and wgmma moves 16-byte chunk c of row r to chunk c ^ (r % 8).
HOST_DEVICE constexpr int swizzle128(int offset) { return offset ^ ((offset >> 3) & 0x70); }

}  // namespace gemma_ext::simt

#if defined(__CUDACC__)
#include "device.h"
#include "device_sm90.h"
#include "device_wgmma.h"
#else
#include "host_async.h"
#include "host_mma.h"
#include "host_warp.h"
#include "host_wgmma.h"
#endif

namespace simt = gemma_ext::simt;
