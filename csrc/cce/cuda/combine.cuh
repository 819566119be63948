// SPDX-License-Identifier: Apache-2.0
// From strips, which leave the label out, and the label's logit to rows, and what the filter draws by, in a
// fixed order (sampling.h).
//   lse = log(exp s[label] + sum_j exp(max_j) sum_j),  nll = lse - s[label],  mean = sum_v p s
#pragma once

#include <math.h>

#include "forward.cuh"

namespace gemma_ext::cce::cuda {

// What is known of a row while its tiles come a part at a time.
struct RowState {
  double total, weighted, classes;  // exp(s - top), times s, of classes
  double squares, sums;             // exp(2 (s - top)), s
  float top;
  int argmax;
};

struct CombineParams {
  Rows rows;
  StripPlanes strips;
  const float* target;        // [N]
  const float* class_weight;  // [V] or null
  RowOutputs out;
  int64_t N, V;
  int tiles;
  RowState* state;  // [N], or null where all tiles are at hand
  bool first, last;
};

constexpr int kCombineRows = simt::kWarpSize;  // one per lane
constexpr int kCombineWarps = 8;               // each takes every eighth tile
constexpr int kCombineThreads = kCombineRows * kCombineWarps;

KERNEL void clear_rows_kernel(CombineParams p) {
  const int64_t i = int64_t{simt::block_idx()} * kCombineThreads + simt::thread_idx();
  if (i >= p.N) return;
  p.out.nll[i] = 0.0f;
  p.out.lse[i] = 0.0f;
  p.out.lse_low[i] = 0.0f;
  if (p.out.mean) p.out.mean[i] = 0.0f;
  if (p.out.class_sum) p.out.class_sum[i] = 0.0f;
  if (p.out.argmax) p.out.argmax[i] = -1;
  if (p.out.log_squares) p.out.log_squares[i] = 0.0f;
  if (p.out.average) p.out.average[i] = 0.0f;
}

struct CombineShared {
  float top[kCombineWarps][kCombineRows];
  int argmax[kCombineWarps][kCombineRows];
  double total[5][kCombineWarps][kCombineRows];  // exp, exp s, class, exp^2, s
};

KERNEL void combine_kernel(CombineParams p) {
  CombineShared& s = *simt::shared<CombineShared>();
  const int lane = simt::lane_idx(), warp = simt::warp_idx();
  const int64_t row = int64_t{simt::block_idx()} * kCombineRows + lane;
  const bool valid = row < *p.rows.count;
  RowState before{0, 0, 0, 0, 0, -kInfinity, INT32_MAX};
  if (valid && !p.first) before = p.state[row];
  float top = -kInfinity;
  int argmax = INT32_MAX;
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
  const int label = valid ? p.rows.label[row] : kMissing;
  const float target = p.last && label >= 0 ? p.target[row] : -kInfinity;
  top = fmaxf(target, before.top);
  for (int w = 0; w < kCombineWarps; ++w) top = fmaxf(top, s.top[w][lane]);
  argmax = before.top == top ? before.argmax : INT32_MAX;
  for (int w = 0; w < kCombineWarps; ++w) {
    if (s.top[w][lane] == top) argmax = lesser(argmax, s.argmax[w][lane]);
  }
  if (p.last && label >= 0 && target == top) argmax = lesser(argmax, label);

  double total = 0, weighted = 0, classes = 0, squares = 0, sums = 0;
  for (int t = warp; t < p.tiles && valid; t += kCombineWarps) {
    const int64_t at = t * p.N + row;
    const float x = p.strips.max[at];
    const double factor = x == -kInfinity ? 0.0 : expf(x - top);
    total += p.strips.sum[at] * factor;
    if (p.strips.weighted) weighted += p.strips.weighted[at] * factor;
    if (p.strips.class_sum) classes += p.strips.class_sum[at];
    if (!p.strips.total) continue;
    squares += p.strips.square[at] * factor * factor;
    sums += p.strips.total[at];
  }
  s.total[0][warp][lane] = total;
  s.total[1][warp][lane] = weighted;
  s.total[2][warp][lane] = classes;
  s.total[3][warp][lane] = squares;
  s.total[4][warp][lane] = sums;
  simt::sync_block();
  if (warp > 0 || !valid) return;
  total = weighted = classes = squares = sums = 0;
  for (int w = 0; w < kCombineWarps; ++w) {
    total += s.total[0][w][lane];
    weighted += s.total[1][w][lane];
    classes += s.total[2][w][lane];
    squares += s.total[3][w][lane];
    sums += s.total[4][w][lane];
  }
  // a total of a top of -inf is 0 or NaN
  const double factor = before.top == -kInfinity ? 1.0 : exp(static_cast<double>(before.top) - top);
  total += before.total * factor;
  weighted += before.weighted * factor;
  classes += before.classes;
  squares += before.squares * factor * factor;
  sums += before.sums;
  if (p.state) p.state[row] = {total, weighted, classes, squares, sums, top, argmax};
  if (!p.last) return;
  const double rivals = total;
  if (target != -kInfinity) {
    const double at_label = exp(static_cast<double>(target) - top);
    total += at_label;
    weighted += at_label * target;
    squares += at_label * at_label;
  }
  if (label >= 0) sums += target;
  if (label >= 0 && p.class_weight) classes += static_cast<double>(p.class_weight[label]) * target;
  const double lse = top + log(total);
  const double nll = label < 0 ? lse : target == top ? log1p(rivals) : lse - target;
  const int to = p.rows.row[row];
  const float high = static_cast<float>(lse);
  p.out.lse[to] = high;
  p.out.lse_low[to] = isfinite(high) ? static_cast<float>(lse - high) : 0.0f;
  p.out.nll[to] = label == kInvalid ? static_cast<float>(NAN) : static_cast<float>(nll);
  if (p.out.mean) p.out.mean[to] = static_cast<float>(weighted / total);
  if (p.out.class_sum) p.out.class_sum[to] = static_cast<float>(classes);
  if (p.out.argmax) p.out.argmax[to] = argmax == INT32_MAX ? -1 : argmax;
  if (p.out.log_squares) p.out.log_squares[to] = static_cast<float>(log(squares) - 2 * log(total));
  if (p.out.average) p.out.average[to] = static_cast<float>(sums / static_cast<double>(p.V));
}

enum Value { kKept, kNoise = kCandidates, kEnergy = 2 * kCandidates, kValues };

// What the lean form remembers of a strip until lse is known; the rest is in the masses, all of them relative
// to the top of the row when the strip's part of the tiles had passed.
struct Remembered {
  float* top;          // [parts, N]
  simt::bf16* spread;  // [tiles, N] sum p^2 over the mass
};

struct RememberParams {
  Rows rows;
  StripPlanes strips;
  const RowState* state;
  Remembered remembered;
  simt::bf16* masses;  // Forward::masses: the mass and, in its second plane, max s
  bool wants_reach;
  int64_t N;
  int tiles;  // of all parts
  int part, first_tile;
};

constexpr int kRememberThreads = 256;

// A block per tile of the part and 256 rows.
KERNEL void remember_kernel(RememberParams p) {
  const int blocks = static_cast<int>((p.N + kRememberThreads - 1) / kRememberThreads);
  const int64_t row = simt::block_idx() % blocks * kRememberThreads + simt::thread_idx();
  const int64_t tile = simt::block_idx() / blocks;
  if (row >= *p.rows.count) return;
  const int64_t from = tile * p.N + row, to = from + p.first_tile * p.N;
  const float max = p.strips.max[from], slope = p.strips.slope[from], top = p.state[row].top;
  const float peak = max == -kInfinity ? 0.0f : expf(max - top);
  p.masses[to] = narrow<simt::bf16>(peak * slope);
  if (p.wants_reach) p.masses[p.tiles * p.N + to] = narrow<simt::bf16>(max - top);
  p.remembered.spread[to] =
      narrow<simt::bf16>(slope > 0.0f ? peak * (p.strips.square[from] / slope) : 0.0f);
  if (tile == 0) p.remembered.top[p.part * p.N + row] = top;
}

struct MassParams {
  Rows rows;
  StripPlanes strips;
  RowOutputs out;
  void* masses;     // Forward::masses; the first plane still holds slopes
  double* tallies;  // [blocks, kValues]
  double* summary;  // [3]
  double eps, break_even;
  int64_t N;
  int tiles, blocks;
  Remembered remembered;  // lean
  int part_tiles;
};

struct MassShared {
  float part[kValues][kCombineThreads];
};

// Rows as in combine_kernel. M: of the masses, bf16 in the lean form.
template <class M>
KERNEL void mass_kernel(MassParams p) {
  constexpr bool kLean = !std::is_same_v<M, float>;
  M* masses = static_cast<M*>(p.masses);
  MassShared& s = *simt::shared<MassShared>();
  const int lane = simt::lane_idx(), warp = simt::warp_idx(), thread = simt::thread_idx();
  const int64_t row = int64_t{simt::block_idx()} * kCombineRows + lane;
  const int64_t reach = p.tiles * p.N;
  float kept[kCandidates] = {}, noise[kCandidates] = {}, energy = 0.0f;
  float tau[kCandidates], inverse[kCandidates];
  UNROLL
  for (int i = 0; i < kCandidates; ++i) {
    tau[i] = static_cast<float>(tau_of(p.eps, i));
    inverse[i] = 1.0f / tau[i];
  }
  if (row < *p.rows.count) {
    const int label = p.rows.label[row], from = p.rows.row[row];
    const float lse = p.out.lse[from], low = p.out.lse_low[from];
    const float mean = p.out.mean ? p.out.mean[from] : 0.0f;
    const float miss = label >= 0 ? -expm1f(-p.out.nll[from]) : 0.0f;
    for (int t = warp; t < p.tiles; t += kCombineWarps) {
      const int64_t at = t * p.N + row;
      const float top = kLean ? p.remembered.top[t / p.part_tiles * p.N + row] : p.strips.max[at];
      const float peak = expf((top - lse) - low);
      const M stored = narrow<M>(peak * widen(masses[at]));
      const float mass = widen(stored);
      masses[at] = stored;
      if (p.out.mean) {
        const float max = kLean ? top + widen(masses[reach + at]) : top;
        // not of a max of -inf
        const float distance = mass > 0.0f ? fmaxf(1.0f, fabsf(max - mean)) : 1.0f;
        masses[reach + at] = narrow<M>(mass * distance);
      }
      const bool here = label >= 0 && label / kTile == t;
      // sum p^2 of the strip, over its mass
      float energy_here, spread;
      if constexpr (kLean) {
        spread = peak * widen(p.remembered.spread[at]);
        energy_here = spread * mass;
      } else {
        energy_here = peak * peak * p.strips.square[at];
        spread = mass > 0.0f ? energy_here / mass : 0.0f;
      }
      energy += here ? miss * miss : energy_here;
      UNROLL
      for (int i = 0; i < kCandidates; ++i) {
        kept[i] += here ? 1.0f : fminf(1.0f, mass * inverse[i]);
        noise[i] += here ? 0.0f : spread * fmaxf(tau[i] - mass, 0.0f);
      }
    }
  } else if (row < p.N) {
    for (int t = warp; t < p.tiles; t += kCombineWarps) {
      masses[t * p.N + row] = M{};
      if (p.out.mean) masses[reach + t * p.N + row] = M{};
    }
  }
  UNROLL
  for (int i = 0; i < kCandidates; ++i) {
    s.part[kKept + i][thread] = kept[i];
    s.part[kNoise + i][thread] = noise[i];
  }
  s.part[kEnergy][thread] = energy;
  simt::sync_block();
  if (thread >= kValues) return;
  double sum = 0;
  for (int i = 0; i < kCombineThreads; ++i) sum += s.part[thread][i];
  p.tallies[int64_t{simt::block_idx()} * kValues + thread] = sum;
}

constexpr int kReportThreads = kValues * simt::kWarpSize;

// One block: a warp per value.
KERNEL void report_kernel(MassParams p) {
  double (*s_part)[simt::kWarpSize] = simt::shared<double[simt::kWarpSize]>();
  const int lane = simt::lane_idx(), value = simt::warp_idx();
  double sum = 0;
  for (int b = lane; b < p.blocks; b += simt::kWarpSize) {
    sum += p.tallies[int64_t{b} * kValues + value];
  }
  s_part[value][lane] = sum;
  simt::sync_block();
  if (lane == 0) {
    for (int l = 1; l < simt::kWarpSize; ++l) sum += s_part[value][l];
    s_part[value][0] = sum;
  }
  simt::sync_block();
  if (simt::thread_idx() != 0) return;
  double kept[kCandidates], noise[kCandidates];
  for (int i = 0; i < kCandidates; ++i) {
    kept[i] = s_part[kKept + i][0];
    noise[i] = s_part[kNoise + i][0];
  }
  const FilterReport report =
      choose_tau(p.eps, p.break_even, static_cast<double>(*p.rows.count) * p.tiles, kept, noise,
                 s_part[kEnergy][0]);
  p.summary[0] = report.kept;
  p.summary[1] = report.error;
  p.summary[2] = report.tau;
}

KERNEL void keep_all_kernel(MassParams p) {
  if (simt::thread_idx() < 3) p.summary[simt::thread_idx()] = simt::thread_idx() == 0 ? 1 : 0;
}

}  // namespace gemma_ext::cce::cuda
