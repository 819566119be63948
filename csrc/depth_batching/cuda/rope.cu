// SPDX-License-Identifier: Apache-2.0
#include "rope.cuh"

namespace gemma_ext::depth_batching::cuda {
namespace {

// A warp per row and head.
template <class T>
KERNEL_BOUNDS(kRopeThreads, 8)
void rope_write_kernel(RopeWrite c) {
  const int64_t heads = c.q_heads + c.pool.heads;
  const int64_t unit = int64_t{simt::block_idx()} * kRopeWarps + simt::warp_idx();
  if (unit >= c.places.n * heads) return;
  const int64_t i = unit / heads;
  rope_head<T>(c, i, c.places.loop[i], unit % heads,
               simt::shared<float>() + simt::warp_idx() * c.pool.width);
}

}  // namespace

int64_t workspace(const RopeWrite&) { return 0; }

Status run(const RopeWrite& call, void*, Stream stream) {
  Launches launches(stream);
  const int64_t blocks = ceil_div(call.places.n * (call.q_heads + call.pool.heads), kRopeWarps);
  by_dtype(call.pool.type, [&](auto like) {
    launches.add(rope_write_kernel<decltype(like)>, blocks, kRopeThreads,
                 rope_shared_bytes(call.pool), call);
  });
  return launches.status();
}

}  // namespace gemma_ext::depth_batching::cuda
