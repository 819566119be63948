// SPDX-License-Identifier: Apache-2.0
// nvcc backend, from sm_90: mbarriers, TMA tiles, clusters. wgmma and setmaxnreg need sm_90a.
#pragma once

#include <cuda.h>

#include "device.h"

namespace gemma_ext::simt {

using TensorMap = CUtensorMap;

// Strides in bytes, of every dimension but the first, which is contiguous.
template <class T, int kRank>
Status make_tensor_map(TensorMap* map, const T* base, const int64_t (&sizes)[kRank],
                       const int64_t (&strides)[kRank - 1], const int (&box)[kRank],
                       Swizzle swizzle) {
  static_assert(kRank == 2 || kRank == 3);
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const Status status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                         cudaEnableDefault, &found);
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  cuuint64_t dims[kRank], bytes[kRank - 1];
  cuuint32_t boxes[kRank], steps[kRank];
  for (int d = 0; d < kRank; ++d) {
    dims[d] = sizes[d];
    boxes[d] = box[d];
    steps[d] = 1;
    if (d > 0) bytes[d - 1] = strides[d - 1];
  }
  const CUtensorMapDataType type = std::is_same_v<T, bf16>  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : std::is_same_v<T, f16> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      map, type, kRank, const_cast<T*>(base), dims, bytes, boxes, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle == Swizzle::k128B ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

DEVICE void mbarrier_init(Mbarrier* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count)
               : "memory");
}
DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void mbarrier_arrive(Mbarrier* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
DEVICE void mbarrier_arrive_expect_tx(Mbarrier* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
}
// Says that shared memory was read, orders no ordinary store: .release.cluster is a fence of the whole device,
// and .acquire.cluster in the wait drops the L1, once a k-step in a pipeline.
DEVICE void mbarrier_arrive_remote(Mbarrier* bar, int rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(bar)),
      "r"(rank)
      : "memory");
}
DEVICE void mbarrier_wait(Mbarrier* bar, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(bar)), "r"(parity)
        : "memory");
  }
}

#define SIMT_LOAD "cp.async.bulk.tensor."
#define SIMT_FROM_GLOBAL "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
DEVICE void tma_load(void* to, const TensorMap& map, Mbarrier* bar, int x, int y) {
  asm volatile(SIMT_LOAD "2" SIMT_FROM_GLOBAL
                         " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(bar)), "r"(x), "r"(y)
               : "memory");
}
DEVICE void tma_load(void* to, const TensorMap& map, Mbarrier* bar, int x, int y, int z) {
  asm volatile(SIMT_LOAD "3" SIMT_FROM_GLOBAL
                         " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(bar)), "r"(x), "r"(y), "r"(z)
               : "memory");
}
DEVICE void tma_load_multicast(void* to, const TensorMap& map, Mbarrier* bar, uint16_t ranks, int x,
                               int y) {
  asm volatile(SIMT_LOAD
               "2" SIMT_FROM_GLOBAL
               ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(bar)), "h"(ranks), "r"(x), "r"(y)
               : "memory");
}
DEVICE void tma_load_multicast(void* to, const TensorMap& map, Mbarrier* bar, uint16_t ranks, int x,
                               int y, int z) {
  asm volatile(SIMT_LOAD
               "3" SIMT_FROM_GLOBAL
               ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(bar)), "h"(ranks), "r"(x), "r"(y), "r"(z)
               : "memory");
}
#undef SIMT_LOAD
#undef SIMT_FROM_GLOBAL

#define SIMT_STORE(name, instruction, kind)                                       \
  DEVICE void name(const TensorMap& map, const void* from, int x, int y) {        \
    asm volatile(instruction ".2d.global.shared::cta" kind                        \
                             ".bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),     \
                 "r"(shared_address(from)), "r"(x), "r"(y)                        \
                 : "memory");                                                     \
  }                                                                               \
  DEVICE void name(const TensorMap& map, const void* from, int x, int y, int z) { \
    asm volatile(instruction ".3d.global.shared::cta" kind                        \
                             ".bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map), \
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)                \
                 : "memory");                                                     \
  }
SIMT_STORE(tma_store, "cp.async.bulk.tensor", ".tile")
SIMT_STORE(tma_reduce_add, "cp.reduce.async.bulk.tensor", ".add.tile")
#undef SIMT_STORE

DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE int cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
template <class T>
DEVICE T* map_shared(T* p, int rank) {
  uint64_t remote;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(remote);
}

}  // namespace gemma_ext::simt
