// SPDX-License-Identifier: Apache-2.0
// nvcc backend for every architecture from sm_80: one instruction, or one CUDA builtin that compiles
// to one, per function. device_sm90.h adds what begins with sm_90.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace gemma_ext::simt {

using Stream = cudaStream_t;
using Status = cudaError_t;

template <class Params>
Status launch_cluster(void (*kernel)(Params), int grid, int block, int cluster, int shared_bytes,
                      Stream stream, const std::type_identity_t<Params>& params) {
  constexpr int kDefaultShared = 48 << 10;  // more needs the attribute
  if (shared_bytes > kDefaultShared) {
    const Status status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// The current device. GEMMA_EXT_SM90A: the build has code for sm_90a.
inline Device device() {
#if defined(GEMMA_EXT_SM90A)
  constexpr bool kBuilt = true;
#else
  constexpr bool kBuilt = false;
#endif
  const auto attribute = [](cudaDeviceAttr which) {
    int index = 0, value = 0;
    cudaGetDevice(&index);
    cudaDeviceGetAttribute(&value, which, index);
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount),
          kBuilt && attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
              attribute(cudaDevAttrComputeCapabilityMinor) == 0};
}

inline const char* status_text(Status status) { return cudaGetErrorString(status); }

template <class Params>
Status launch(void (*kernel)(Params), int grid, int block, int shared_bytes, Stream stream,
              const std::type_identity_t<Params>& params) {
  return launch_cluster(kernel, grid, block, 1, shared_bytes, stream, params);
}

// From pageable memory, which is read before this returns. Refused while the stream is being captured: a graph
// would read it again.
inline Status copy_in(void* to, const void* from, int64_t bytes, Stream stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const Status status = cudaStreamIsCapturing(stream, &capture);
  if (status != cudaSuccess) return status;
  if (capture != cudaStreamCaptureStatusNone) return cudaErrorStreamCaptureUnsupported;
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream);
}

// Waits for the stream; refused while it is being captured.
inline Status copy_out(void* to, const void* from, int64_t bytes, Stream stream) {
  const Status status = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream);
  return status == cudaSuccess ? cudaStreamSynchronize(stream) : status;
}

DEVICE int thread_idx() { return threadIdx.x; }
DEVICE int block_idx() { return blockIdx.x; }
DEVICE int block_dim() { return blockDim.x; }
DEVICE int grid_dim() { return gridDim.x; }
DEVICE int lane_idx() { return threadIdx.x % kWarpSize; }
DEVICE int warp_idx() { return threadIdx.x / kWarpSize; }

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

template <class T>
DEVICE T* shared(int byte_offset = 0) {
  return reinterpret_cast<T*>(dynamic_shared + byte_offset);
}
DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

DEVICE void sync_block() { __syncthreads(); }
DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void sync_warp(unsigned mask = kFullMask) { __syncwarp(mask); }
DEVICE void fence_block() { __threadfence_block(); }
DEVICE void fence_device() { __threadfence(); }

template <class T>
DEVICE T shfl(T x, int from, unsigned mask = kFullMask) {
  return __shfl_sync(mask, x, from);
}
template <class T>
DEVICE T shfl_xor(T x, int lane_mask, unsigned mask = kFullMask) {
  return __shfl_xor_sync(mask, x, lane_mask);
}
template <class T>
DEVICE T shfl_up(T x, int delta, unsigned mask = kFullMask) {
  return __shfl_up_sync(mask, x, delta);
}
template <class T>
DEVICE T shfl_down(T x, int delta, unsigned mask = kFullMask) {
  return __shfl_down_sync(mask, x, delta);
}

DEVICE unsigned ballot(bool predicate, unsigned mask = kFullMask) {
  return __ballot_sync(mask, predicate);
}
DEVICE int popcount(unsigned x) { return __popc(x); }
DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
DEVICE bool any(bool predicate, unsigned mask = kFullMask) { return __any_sync(mask, predicate); }
DEVICE bool all(bool predicate, unsigned mask = kFullMask) { return __all_sync(mask, predicate); }

template <class T>
DEVICE T reduce_add(T x, unsigned mask = kFullMask) {
  return __reduce_add_sync(mask, x);
}
template <class T>
DEVICE T reduce_min(T x, unsigned mask = kFullMask) {
  return __reduce_min_sync(mask, x);
}
template <class T>
DEVICE T reduce_max(T x, unsigned mask = kFullMask) {
  return __reduce_max_sync(mask, x);
}

// elect.sync from sm_90 on; before it lane 0.
DEVICE bool elect_one() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
               : "=r"(elected)::"memory");
  return elected;
#else
  return lane_idx() == 0;
#endif
}

template <class T>
DEVICE T atomic_add(T* p, T x) {
  return atomicAdd(p, x);
}
template <class T>
DEVICE T atomic_min(T* p, T x) {
  return atomicMin(p, x);
}
template <class T>
DEVICE T atomic_max(T* p, T x) {
  return atomicMax(p, x);
}
template <class T>
DEVICE T atomic_exchange(T* p, T x) {
  return atomicExch(p, x);
}
template <class T>
DEVICE T atomic_cas(T* p, T expected, T x) {
  return atomicCAS(p, expected, x);
}

#define SIMT_UNARY(name, instruction)               \
  DEVICE float name(float x) {                      \
    float y;                                        \
    asm(instruction " %0, %1;" : "=f"(y) : "f"(x)); \
    return y;                                       \
  }
SIMT_UNARY(exp2_approx, "ex2.approx.ftz.f32")
SIMT_UNARY(log2_approx, "lg2.approx.ftz.f32")
SIMT_UNARY(tanh_approx, "tanh.approx.f32")
SIMT_UNARY(rcp_approx, "rcp.approx.ftz.f32")
SIMT_UNARY(rsqrt_approx, "rsqrt.approx.ftz.f32")
#undef SIMT_UNARY

DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class T>
DEVICE T from_float(float x) {
  T y;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  } else {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  }
  return y;
}
// The instruction takes the upper half first.
template <class T>
DEVICE uint32_t pack(float low, float high) {
  uint32_t y;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  }
  return y;
}

#define SIMT_LDMATRIX(name, trans)                                                           \
  DEVICE void name(uint32_t (&r)[1], const void* row) {                                      \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" trans ".shared.b16 {%0}, [%1];"             \
                 : "=r"(r[0])                                                                \
                 : "r"(shared_address(row))                                                  \
                 : "memory");                                                                \
  }                                                                                          \
  DEVICE void name(uint32_t (&r)[2], const void* row) {                                      \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0, %1}, [%2];"         \
                 : "=r"(r[0]), "=r"(r[1])                                                    \
                 : "r"(shared_address(row))                                                  \
                 : "memory");                                                                \
  }                                                                                          \
  DEVICE void name(uint32_t (&r)[4], const void* row) {                                      \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                            \
                 : "r"(shared_address(row))                                                  \
                 : "memory");                                                                \
  }
SIMT_LDMATRIX(ldmatrix, "")
SIMT_LDMATRIX(ldmatrix_trans, ".trans")
#undef SIMT_LDMATRIX

#define SIMT_STMATRIX(name, trans)                                                 \
  DEVICE void name(void* row, const uint32_t (&r)[1]) {                            \
    asm volatile("stmatrix.sync.aligned.m8n8.x1" trans                             \
                 ".shared.b16 [%0], {%1};" ::"r"(shared_address(row)),             \
                 "r"(r[0])                                                         \
                 : "memory");                                                      \
  }                                                                                \
  DEVICE void name(void* row, const uint32_t (&r)[2]) {                            \
    asm volatile("stmatrix.sync.aligned.m8n8.x2" trans                             \
                 ".shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),         \
                 "r"(r[0]), "r"(r[1])                                              \
                 : "memory");                                                      \
  }                                                                                \
  DEVICE void name(void* row, const uint32_t (&r)[4]) {                            \
    asm volatile("stmatrix.sync.aligned.m8n8.x4" trans                             \
                 ".shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), \
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])                        \
                 : "memory");                                                      \
  }
SIMT_STMATRIX(stmatrix, "")
SIMT_STMATRIX(stmatrix_trans, ".trans")
#undef SIMT_STMATRIX

#define SIMT_MMA(type)                                                                \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    SIMT_MMA("bf16");
  } else {
    SIMT_MMA("f16");
  }
}
#undef SIMT_MMA

DEVICE void cp_async(void* to, const void* from, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace gemma_ext::simt
