// SPDX-License-Identifier: Apache-2.0
// A warp per row and head: norm, rotation, one rounding. With a head of K goes the same of V.
#include "launches.h"

namespace gemma_ext::depth_batching::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / simt::kWarpSize;

template <class T>
KERNEL_BOUNDS(kThreads, 8)
void rope_write_kernel(RopeWrite c) {
  const Pool& pool = c.pool;
  const Places& p = c.places;
  const int width = static_cast<int>(pool.width), half = static_cast<int>(c.half);
  const int lane = simt::lane_idx();
  const int64_t heads = c.q_heads + pool.heads;
  const int64_t unit = int64_t{simt::block_idx()} * kWarps + simt::warp_idx();
  if (unit >= p.n * heads) return;
  const int64_t i = unit / heads, head = unit % heads;
  const bool query = head < c.q_heads;
  T* out = static_cast<T*>(c.out) + (i * c.q_heads + head) * width;
  bool valid = is_place(p, i);
  int64_t page = 0, depth = 0, setting = 0;
  if (valid) {
    page = p.block_tables[p.req[i] * p.max_pages + p.pos[i] / kPage];
    depth = c.depth_of[p.loop[i]];
    setting = c.rope && c.rope_of ? c.rope_of[p.loop[i]] : 0;
    valid = page >= 0 && page < pool.pages && depth >= 0 && depth < pool.depths &&
            (!c.rope || (setting >= 0 && setting < c.settings && p.pos[i] < c.positions));
  }
  if (!valid) {
    const float nothing = p.req[i] == -1 ? 0.0f : __builtin_nanf("");
    for (int d = lane; query && d < width; d += simt::kWarpSize) out[d] = narrow<T>(nothing);
    return;
  }
  const int loop = p.loop[i], offset = p.pos[i] % kPage;
  const Rows& rows = query ? c.q : c.k;
  const Norm& norm = query ? c.q_norm : c.k_norm;
  const int64_t own = query ? head : head - c.q_heads;
  const T* from = static_cast<const T*>(rows.data) + i * rows.stride + own * width;
  float* s_x = simt::shared<float>() + simt::warp_idx() * width;
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

}  // namespace

int64_t workspace(const RopeWrite&) { return 0; }

Status run(const RopeWrite& call, void*, Stream stream) {
  Launches launches(stream);
  const int64_t blocks = ceil_div(call.places.n * (call.q_heads + call.pool.heads), kWarps);
  const int bytes = static_cast<int>(kWarps * call.pool.width * sizeof(float));
  by_dtype(call.pool.type, [&](auto like) {
    launches.add(rope_write_kernel<decltype(like)>, blocks, kThreads, bytes, call);
  });
  return launches.status();
}

}  // namespace gemma_ext::depth_batching::cuda
