// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/simt/simt.h"

struct SumParams {
  const float* x;  // [n]
  float* sum;      // [1]
  int n;
};

DEVICE float warp_sum(float x) {
  for (int d = 16; d > 0; d /= 2) x += simt::shfl_xor(x, d);
  return x;
}

// sum = sum_i x[i]; kBarrier off leaves out the barrier between the two stages.
template <bool kBarrier>
DEVICE void block_sum(const SumParams& p) {
  float* s_warp = simt::shared<float>();
  const int stride = simt::block_dim() * simt::grid_dim();
  float x = 0;
  for (int i = simt::block_idx() * simt::block_dim() + simt::thread_idx(); i < p.n; i += stride) {
    x += p.x[i];
  }
  x = warp_sum(x);
  if (simt::lane_idx() == 0) s_warp[simt::warp_idx()] = x;
  if (kBarrier) simt::sync_block();
  if (simt::warp_idx() == 0) {
    x = warp_sum(simt::lane_idx() < simt::block_dim() / 32 ? s_warp[simt::lane_idx()] : 0.0f);
    if (simt::lane_idx() == 0) simt::atomic_add(p.sum, x);
  }
}
KERNEL void sum_kernel(SumParams p) { block_sum<true>(p); }
KERNEL void sum_without_barrier_kernel(SumParams p) { block_sum<false>(p); }

struct QueueParams {
  int* out;  // [rounds * 32]
  int rounds;
};

// Warp 0 writes one slot, warp 1 reads it: barrier 1 says full, barrier 2 empty.
template <bool kWaitsForEmpty>
DEVICE void queue(const QueueParams& p) {
  int* s_slot = simt::shared<int>();
  const int lane = simt::lane_idx();
  for (int i = 0; i < p.rounds; ++i) {
    if (simt::warp_idx() == 0) {
      if (i > 0 && kWaitsForEmpty) simt::barrier_sync(2, 64);
      s_slot[31 - lane] = 1000 * i + lane;
      simt::barrier_arrive(1, 64);
    } else {
      simt::barrier_sync(1, 64);
      p.out[32 * i + lane] = s_slot[lane];
      if (i + 1 < p.rounds && kWaitsForEmpty) simt::barrier_arrive(2, 64);
    }
  }
}
KERNEL void queue_kernel(QueueParams p) { queue<true>(p); }
KERNEL void queue_without_empty_kernel(QueueParams p) { queue<false>(p); }

struct LaneParams {
  int* out;  // [what, block_dim]
};

KERNEL void warp_ops_kernel(LaneParams p) {
  const int lane = simt::lane_idx(), t = simt::thread_idx(), n = simt::block_dim();
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  p.out[0 * n + t] = simt::shfl(100 + t, 5);
  p.out[1 * n + t] = simt::shfl(100 + t, lane + 33);
  p.out[2 * n + t] = simt::shfl_up(100 + t, 3);
  p.out[3 * n + t] = simt::shfl_down(100 + t, 3);
  p.out[4 * n + t] = simt::shfl_xor(100 + t, 1, half);
  p.out[5 * n + t] = static_cast<int>(simt::ballot(lane % 3 == 0));
  p.out[6 * n + t] = static_cast<int>(simt::ballot(lane % 2 == 0, half));
  p.out[7 * n + t] = simt::any(lane == 7) + 2 * simt::all(lane < 32) + 4 * simt::all(lane < 31);
  p.out[8 * n + t] = simt::reduce_add(t);
  p.out[9 * n + t] = simt::reduce_min(t - 40, half);
  p.out[10 * n + t] = simt::reduce_max(t - 40, half);
  const bool leader = simt::elect_one();
  p.out[11 * n + t] = leader + 2 * simt::elect_one();
}

struct OrderParams {
  int* next;   // [1]
  int* order;  // [grid]
};

KERNEL void order_kernel(OrderParams p) {
  if (simt::elect_one()) p.order[simt::atomic_add(p.next, 1)] = simt::block_idx();
}

KERNEL void early_return_kernel(LaneParams p) {
  if (simt::thread_idx() >= 40) return;
  simt::sync_block();
  p.out[simt::thread_idx()] = 1;
}

KERNEL void divergent_shuffle_kernel(LaneParams p) {
  if (simt::lane_idx() < 16) {
    p.out[simt::lane_idx()] = simt::shfl(simt::lane_idx(), 0);
  } else {
    p.out[simt::lane_idx()] = simt::shfl_xor(simt::lane_idx(), 1);
  }
}

KERNEL void divergent_mask_kernel(LaneParams p) {
  const unsigned mask = simt::lane_idx() < 16 ? 0xffffffffu : 0xffff0000u;
  p.out[simt::lane_idx()] = simt::shfl(simt::lane_idx(), 20, mask);
  simt::sync_warp();
}

KERNEL void divergent_barrier_kernel(LaneParams p) {
  if (simt::lane_idx() < 16) {
    simt::sync_block();
  } else {
    p.out[0] = 1;
    simt::sync_block();
  }
}

KERNEL void exited_lane_kernel(LaneParams p) {
  if (simt::lane_idx() == 3) return;
  p.out[simt::lane_idx()] = simt::reduce_add(1);
}

KERNEL void deadlock_kernel(LaneParams p) {
  if (simt::warp_idx() == 0) {
    simt::barrier_sync(3, 96);
  } else {
    p.out[0] = 1;
    simt::barrier_sync(3, 96);
  }
}

KERNEL void wrong_count_kernel(LaneParams) { simt::barrier_sync(1, 64 + 32 * simt::warp_idx()); }

KERNEL void out_of_bounds_kernel(LaneParams p) { p.out[simt::thread_idx()] = 1; }
KERNEL void shared_out_of_bounds_kernel(LaneParams) { simt::shared<int>()[simt::thread_idx()] = 1; }

KERNEL void poison_kernel(LaneParams p) {
  p.out[simt::thread_idx()] = simt::shared<int>()[simt::thread_idx()];
  simt::sync_block();
  simt::shared<int>()[simt::thread_idx()] = 0;
}
