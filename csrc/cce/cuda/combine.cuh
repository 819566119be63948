// SPDX-License-Identifier: Apache-2.0
// From strips to rows, and what the filter would drop, in a fixed order.
//   lse = log sum_j exp(max_j) sum_j,  nll = lse - s[label],  mean = sum_v p s
#pragma once

#include <math.h>

#include "forward.cuh"

namespace gemma_ext::cce::cuda {

struct CombineParams {
  Rows rows;
  StripPlanes strips;
  const float* target;  // [N]
  RowOutputs out;
  int64_t N;
  int tiles;
};

constexpr int kCombineRows = simt::kWarpSize;  // one per lane
constexpr int kCombineWarps = 8;               // each takes every eighth tile
constexpr int kCombineThreads = kCombineRows * kCombineWarps;

KERNEL void clear_rows_kernel(CombineParams p) {
  const int64_t i = int64_t{simt::block_idx()} * kCombineThreads + simt::thread_idx();
  if (i >= p.N) return;
  p.out.nll[i] = 0.0f;
  p.out.lse[i] = 0.0f;
  if (p.out.mean) p.out.mean[i] = 0.0f;
  if (p.out.class_sum) p.out.class_sum[i] = 0.0f;
  if (p.out.argmax) p.out.argmax[i] = -1;
}

struct CombineShared {
  float top[kCombineWarps][kCombineRows];
  int argmax[kCombineWarps][kCombineRows];
  double total[3][kCombineWarps][kCombineRows];  // exp, exp s, class
};

KERNEL void combine_kernel(CombineParams p) {
  CombineShared& s = *simt::shared<CombineShared>();
  const int lane = simt::lane_idx(), warp = simt::warp_idx();
  const int64_t row = int64_t{simt::block_idx()} * kCombineRows + lane;
  const bool valid = row < *p.rows.count;
  float top = -kInfinity;
  int argmax = INT32_MAX;
  for (int t = warp; t < p.tiles && !valid && row < p.N; t += kCombineWarps) {
    const int64_t at = t * p.N + row;  // saved for the backward: no garbage
    p.strips.max[at] = p.strips.sum[at] = p.strips.slope[at] = 0.0f;
    if (p.strips.weighted) p.strips.weighted[at] = 0.0f;
  }
  for (int t = warp; t < p.tiles && valid; t += kCombineWarps) {
    const int64_t at = t * p.N + row;
    const float x = p.strips.max[at];
    if (p.out.argmax && x >= top) {
      argmax = x > top ? p.strips.argmax[at] : lesser(argmax, p.strips.argmax[at]);
    }
    top = fmaxf(top, x);
  }
  s.top[warp][lane] = top;
  s.argmax[warp][lane] = argmax;
  simt::sync_block();
  argmax = INT32_MAX;
  for (int w = 0; w < kCombineWarps; ++w) top = fmaxf(top, s.top[w][lane]);
  for (int w = 0; w < kCombineWarps; ++w) {
    if (s.top[w][lane] == top) argmax = lesser(argmax, s.argmax[w][lane]);
  }

  double total = 0, weighted = 0, classes = 0;
  for (int t = warp; t < p.tiles && valid; t += kCombineWarps) {
    const int64_t at = t * p.N + row;
    const float x = p.strips.max[at];
    const double factor = x == -kInfinity ? 0.0 : expf(x - top);
    total += p.strips.sum[at] * factor;
    if (p.strips.weighted) weighted += p.strips.weighted[at] * factor;
    if (p.strips.class_sum) classes += p.strips.class_sum[at];
  }
  s.total[0][warp][lane] = total;
  s.total[1][warp][lane] = weighted;
  s.total[2][warp][lane] = classes;
  simt::sync_block();
  if (warp > 0 || !valid) return;
  total = weighted = classes = 0;
  for (int w = 0; w < kCombineWarps; ++w) {
    total += s.total[0][w][lane];
    weighted += s.total[1][w][lane];
    classes += s.total[2][w][lane];
  }
  const double lse = top + log(total);
  const int position = p.rows.position[row], to = p.rows.row[row];
  const double target = position >= 0 ? p.target[row] : 0.0;
  p.out.lse[to] = static_cast<float>(lse);
  p.out.nll[to] = position == kInvalid ? static_cast<float>(NAN) : static_cast<float>(lse - target);
  if (p.out.mean) p.out.mean[to] = static_cast<float>(weighted / total);
  if (p.out.class_sum) p.out.class_sum[to] = static_cast<float>(classes);
  if (p.out.argmax) p.out.argmax[to] = argmax == INT32_MAX ? -1 : argmax;
}

// What each of the candidate thresholds 2^-10 .. 2^-15, or the one given, would drop (the rule and the
// origin of its numbers: cpu/forward.cpp).
constexpr int kCandidates = 6;
constexpr double kError = 0x1p-9, kBreakEven = 0.6;
enum Value {
  kDropped,
  kWorst = kCandidates,
  kNoise = 2 * kCandidates,
  kStrips = 3 * kCandidates,
  kEnergy = 4 * kCandidates,
  kValues
};

struct TallyParams {
  Rows rows;
  StripPlanes strips;
  RowOutputs out;
  double* tallies;  // [blocks, kValues]
  double* summary;  // [4]
  double eps;
  int64_t N;
  int tiles, blocks;
};

HOST_DEVICE double threshold_of(double eps, int candidate) {
  return eps == kAutoEps ? 0x1p-10 / (1 << candidate) : eps;
}

struct TallyShared {
  double part[kCandidates][3][kCombineThreads];  // mass, noise, strips
  double energy[kCombineThreads];
};

KERNEL void tally_kernel(TallyParams p) {
  TallyShared& s = *simt::shared<TallyShared>();
  const int lane = simt::lane_idx(), warp = simt::warp_idx(), thread = simt::thread_idx();
  const int64_t row = int64_t{simt::block_idx()} * kCombineRows + lane;
  const bool valid = row < *p.rows.count;
  double mass[kCandidates] = {}, noise[kCandidates] = {}, strips[kCandidates] = {}, energy = 0;
  if (valid) {
    const int position = p.rows.position[row], from = p.rows.row[row];
    const float lse = p.out.lse[from];
    const double miss = position >= 0 ? -expm1(-static_cast<double>(p.out.nll[from])) : 0.0;
    for (int t = warp; t < p.tiles; t += kCombineWarps) {
      const int64_t at = t * p.N + row;
      const double peak = expf(p.strips.max[at] - lse), sum = p.strips.sum[at];
      const bool target = position >= 0 && position / kTile == t;
      energy += target ? miss * miss : peak * peak;
      UNROLL
      for (int i = 0; i < kCandidates; ++i) {
        const double threshold = threshold_of(p.eps, i);
        if (peak < threshold && !(target && miss >= threshold)) {
          mass[i] += peak * sum;
          noise[i] += peak * peak * sum;
          strips[i] += 1;
        }
      }
    }
  }
  UNROLL
  for (int i = 0; i < kCandidates; ++i) {
    s.part[i][0][thread] = mass[i];
    s.part[i][1][thread] = noise[i];
    s.part[i][2][thread] = strips[i];
  }
  s.energy[thread] = energy;
  simt::sync_block();
  if (thread >= kValues) return;
  const int candidate = thread % kCandidates, what = thread / kCandidates;
  double result = 0;
  for (int r = 0; r < kCombineRows; ++r) {
    double of_row = 0;
    for (int w = 0; w < kCombineWarps; ++w) {
      const int from = w * kCombineRows + r;
      of_row +=
          thread == kEnergy ? s.energy[from] : s.part[candidate][what <= 1 ? 0 : what - 1][from];
    }
    result = what == 1 ? fmax(result, of_row) : result + of_row;
  }
  p.tallies[int64_t{simt::block_idx()} * kValues + thread] = result;
}

constexpr int kReportThreads = kValues * simt::kWarpSize;

// One block: a warp per value.
KERNEL void report_kernel(TallyParams p) {
  double (*s_part)[simt::kWarpSize] = simt::shared<double[simt::kWarpSize]>();
  const int lane = simt::lane_idx(), value = simt::warp_idx();
  const bool largest = value / kCandidates == 1;
  double sum = 0;
  for (int b = lane; b < p.blocks; b += simt::kWarpSize) {
    const double x = p.tallies[int64_t{b} * kValues + value];
    sum = largest ? fmax(sum, x) : sum + x;
  }
  s_part[value][lane] = sum;
  simt::sync_block();
  if (lane == 0) {
    for (int l = 1; l < simt::kWarpSize; ++l) {
      sum = largest ? fmax(sum, s_part[value][l]) : sum + s_part[value][l];
    }
    s_part[value][0] = sum;
  }
  simt::sync_block();
  if (simt::thread_idx() != 0) return;
  p.summary[0] = 1;
  p.summary[1] = p.summary[2] = p.summary[3] = 0;
  const double rows = *p.rows.count;
  const bool automatic = p.eps == kAutoEps;
  for (int i = 0; i < (automatic ? kCandidates : 1); ++i) {
    const double kept = rows > 0 ? 1 - s_part[kStrips + i][0] / (rows * p.tiles) : 1;
    const bool accurate = s_part[kNoise + i][0] <= kError * kError * s_part[kEnergy][0];
    if (automatic && kept > kBreakEven) return;
    if (automatic && !accurate) continue;
    p.summary[0] = kept;
    p.summary[1] = rows > 0 ? s_part[kDropped + i][0] / rows : 0;
    p.summary[2] = s_part[kWorst + i][0];
    p.summary[3] = threshold_of(p.eps, i);
    return;
  }
}

KERNEL void keep_all_kernel(TallyParams p) {
  if (simt::thread_idx() < 4) p.summary[simt::thread_idx()] = simt::thread_idx() == 0 ? 1 : 0;
}

}  // namespace gemma_ext::cce::cuda
