// SPDX-License-Identifier: Apache-2.0
// Any width and storage type, with plain multiplications: all scores of a split, then their weights, then V.
#pragma once

#include "attention.cuh"

namespace gemma_ext::depth_batching::cuda {

constexpr int kPlainThreads = 128, kPlainWarps = kPlainThreads / simt::kWarpSize;

inline int plain_shared(int64_t width) {
  return static_cast<int>(kHeads * (width + kSplit) * sizeof(float));
}

template <class T>
KERNEL_BOUNDS(kPlainThreads, 8)
void attend_plain_kernel(AttendParams p) {
  const Attention& a = p.call;
  const Unit u = unit_of(p);
  if (!is_row(a, u.row)) return;
  const int width = static_cast<int>(a.pool.width), base = u.split * kSplit;
  const int first = first_token(a, u.row), last = a.places.pos[u.row];
  const int begin = first > base && base >= a.sinks ? first : base;
  const int end = last + 1 < base + kSplit ? last + 1 : base + kSplit;
  if (begin >= end) return;
  const auto sees = [&](int t) { return t >= first || t < a.sinks; };
  float* s_q = simt::shared<float>();       // [kHeads, width]
  float* s_weights = s_q + kHeads * width;  // [kHeads, kSplit]
  const int warp = simt::warp_idx(), lane = simt::lane_idx(), thread = simt::thread_idx();
  const T* q = static_cast<const T*>(a.q.data) + u.row * a.q.stride + u.first * width;
  for (int e = thread; e < kHeads * width; e += kPlainThreads)
    s_q[e] = e < u.heads * width ? widen(q[e]) : 0.0f;
  simt::sync_block();
  for (int t = begin + warp; t < end; t += kPlainWarps) {
    if (!sees(t)) continue;
    const T* page = page_of<T>(a, u.row, t / kPage, 0, u.head);
    const T* k = page ? page + t % kPage * width : nullptr;
    float sums[kHeads] = {};
    for (int d = lane; d < width; d += simt::kWarpSize) {
      const float key = k ? widen(k[d]) : 0.0f;
      UNROLL
      for (int h = 0; h < kHeads; ++h) sums[h] += s_q[h * width + d] * key;
    }
    UNROLL
    for (int h = 0; h < kHeads; ++h) {
      const float sum = warp_sum(sums[h]);
      if (lane == 0) s_weights[h * kSplit + t - base] = score_of(a, sum);
    }
  }
  simt::sync_block();
  for (int h = warp; h < u.heads; h += kPlainWarps) {
    float* weights = s_weights + h * kSplit - base;
    float most = kNothing, total = 0;
    for (int t = begin + lane; t < end; t += simt::kWarpSize)
      if (sees(t)) most = weights[t] > most ? weights[t] : most;
    UNROLL
    for (int mask = 16; mask; mask /= 2) {
      const float other = simt::shfl_xor(most, mask);
      most = other > most ? other : most;
    }
    // lanes have the tokens of one residue, wherever the row begins
    for (int t = base + lane; t < end; t += simt::kWarpSize) {
      if (!sees(t)) continue;
      weights[t] = weight_of(weights[t], most);
      total += weights[t];
    }
    total = warp_sum(total);
    float* part = part_of(p, u.row, u.first + h, u.split);
    if (lane == 0) {
      part[0] = most;
      part[1] = total;
    }
  }
  simt::sync_block();
  for (int d = thread; d < width; d += kPlainThreads) {
    float sums[kHeads] = {};
    for (int t = begin; t < end; ++t) {
      if (!sees(t)) continue;
      const T* page = page_of<T>(a, u.row, t / kPage, 1, u.head);
      const float value = page ? widen(page[t % kPage * width + d]) : 0.0f;
      UNROLL
      for (int h = 0; h < kHeads; ++h) {
        if (h < u.heads) sums[h] += s_weights[h * kSplit + t - base] * value;
      }
    }
    UNROLL
    for (int h = 0; h < kHeads; ++h) {
      if (h < u.heads) part_of(p, u.row, u.first + h, u.split)[kPartHead + d] = sums[h];
    }
  }
}

}  // namespace gemma_ext::depth_batching::cuda
