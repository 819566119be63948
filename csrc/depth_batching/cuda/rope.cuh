// SPDX-License-Identifier: Apache-2.0
// A head of a row by one warp: norm, rotation, one rounding; of K also the same head of V.
#pragma once

#include "launches.h"

namespace gemma_ext::depth_batching::cuda {

constexpr int kRopeThreads = 128, kRopeWarps = kRopeThreads / simt::kWarpSize;

inline int rope_shared_bytes(const Pool& pool) {
  return static_cast<int>(kRopeWarps * pool.width * sizeof(float));
}

// `head`: those of q, then those of K. Row i as if it ran `loop`. s_x [width] is the warp's own.
template <class T>
DEVICE void rope_head(const RopeWrite& c, int64_t i, int loop, int64_t head, float* s_x) {
  const Pool& pool = c.pool;
  const Places& p = c.places;
  const int width = static_cast<int>(pool.width), half = static_cast<int>(c.half);
  const int lane = simt::lane_idx();
  const bool query = head < c.q_heads;
  T* out = query ? static_cast<T*>(c.out) + (i * c.q_heads + head) * width : nullptr;
  bool valid = is_place(p, i);
  int64_t page = 0, depth = 0, setting = 0;
  if (valid) {
    page = p.block_tables[p.req[i] * p.max_pages + p.pos[i] / kPage];
    depth = c.depth_of[loop];
    setting = c.rope && c.rope_of ? c.rope_of[loop] : 0;
    valid = page >= 0 && page < pool.pages && depth >= 0 && depth < pool.depths &&
            (!c.rope || (setting >= 0 && setting < c.settings && p.pos[i] < c.positions));
  }
  if (!valid) {
    const float nothing = p.req[i] == -1 ? 0.0f : __builtin_nanf("");
    for (int d = lane; query && d < width; d += simt::kWarpSize) out[d] = narrow<T>(nothing);
    return;
  }
  const int offset = p.pos[i] % kPage;
  const Rows rows = query ? c.q : c.k;
  const Norm norm = query ? c.q_norm : c.k_norm;
  const int64_t own = query ? head : head - c.q_heads;
  const T* from = static_cast<const T*>(rows.data) + i * rows.stride + own * width;
  float squares = 0;
  for (int d = lane; d < width; d += simt::kWarpSize) {
    const float x = widen(from[d]);
    s_x[d] = x;
    squares += x * x;
  }
  if (norm.weight) {
    const float r = simt::rsqrt_approx(warp_sum(squares) / static_cast<float>(width) + c.eps);
    const float* weight = norm.weight + loop * norm.stride;
    for (int d = lane; d < width; d += simt::kWarpSize)
      s_x[d] = s_x[d] * r * (c.plus_one ? weight[d] + 1.0f : weight[d]);
  }
  simt::sync_warp();
  T* pages = static_cast<T*>(pool.data);
  T* to = query ? out : pages + page_at(pool, depth, page, 0, own) + offset * width;
  const float* table = c.rope ? c.rope + (setting * c.positions + p.pos[i]) * 2 * half : nullptr;
  const int turned = table ? half : 0;
  for (int d = lane; d < turned; d += simt::kWarpSize) {
    const float a = s_x[d], b = s_x[d + half], cos = table[d], sin = table[half + d];
    to[d] = narrow<T>(a * cos - b * sin);
    to[d + half] = narrow<T>(b * cos + a * sin);
  }
  for (int d = 2 * turned + lane; d < width; d += simt::kWarpSize) to[d] = narrow<T>(s_x[d]);
  if (query) return;
  const T* v = static_cast<const T*>(c.v.data) + i * c.v.stride + own * width;
  T* v_to = pages + page_at(pool, depth, page, 1, own) + offset * width;
  for (int d = lane; d < width; d += simt::kWarpSize) v_to[d] = v[d];
  if (c.marks && own == 0 && lane == 0) {
    uint8_t* mark = c.marks + page * kPage + offset;
    if (*mark < loop + 1) *mark = static_cast<uint8_t>(loop + 1);
  }
}

}  // namespace gemma_ext::depth_batching::cuda
