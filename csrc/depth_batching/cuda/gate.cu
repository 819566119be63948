// SPDX-License-Identifier: Apache-2.0
// Exits that need no head: a warp a row.
#include "head_engine.h"
#include "rows.cuh"

namespace gemma_ext::depth_batching::cuda {
namespace {

constexpr int kGateThreads = 128, kGateWarps = kGateThreads / simt::kWarpSize;

DEVICE float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

KERNEL_BOUNDS(kGateThreads, 8) void depth_gate_kernel(Gate c) {
  const int64_t row = int64_t{simt::block_idx()} * kGateWarps + simt::warp_idx();
  if (row >= c.n) return;
  const bool learned = c.mode == kGate || c.mode == kHazard;
  float first = 0, second = 0, third = 0;
  for (int64_t i = simt::lane_idx(); i < c.D; i += simt::kWarpSize) {
    const float h = element(c.h, c.type, row * c.D + i);
    if (learned) {
      first += h * element(c.weight, c.type, i);
      continue;
    }
    const float before = element(c.previous, c.type, row * c.D + i);
    const float step = c.mode == kCosine ? before : h - before;
    first += h * h;
    second += step * step;
    third += h * before;
  }
  first = warp_sum(first);
  second = warp_sum(second);
  third = warp_sum(third);
  if (simt::lane_idx() != 0) return;
  float score;
  if (learned) {
    const float z = first + (c.bias ? *c.bias : 0.0f);
    score = sigmoid(z);
    if (c.mode == kHazard) {
      c.after[row] = c.survival[row] * sigmoid(-z);
      score = 1.0f - c.after[row];
    }
  } else {
    score =
        c.mode == kCosine ? third / (sqrtf(first) * sqrtf(second)) : sqrtf(second) / sqrtf(first);
  }
  c.scores[row] = score;
  const bool leaves = c.mode == kLatentDiff ? leaves_below(score, c.threshold[row], c.strict)
                                            : leaves_above(score, c.threshold[row], c.strict);
  c.exits[row] = leaves || (c.last && c.last[row]);
}

}  // namespace

int64_t workspace(const Gate&) { return 0; }

Status run(const Gate& call, void*, Stream stream) {
  Launches launches(stream);
  launches.add(depth_gate_kernel, ceil_div(call.n, kGateWarps), kGateThreads, 0, call);
  return launches.status();
}

}  // namespace gemma_ext::depth_batching::cuda
