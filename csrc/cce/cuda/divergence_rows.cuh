// SPDX-License-Identifier: Apache-2.0
// From the strips of two heads to rows, and what the filter draws by, in a fixed order; lse of both are known.
#pragma once

#include "combine.cuh"
#include "divergence_sums.cuh"

namespace gemma_ext::cce::cuda {

struct PairRowsParams {
  Rows rows;
  Kind kind;
  PairPlanes strips;
  const float *target, *teacher_target;
  DivergenceRows out;
  int64_t N;
  int tiles;
  float* masses;     // DivergenceForward::masses, or null; strips.sum becomes sum g^2
  float* mean_size;  // [1]
  double* tallies;   // [blocks, kValues]
  double eps;
};

// A compact row with lse of both in twice the bits.
struct PairRow {
  double lse{}, teacher_lse{}, divergence{}, mean{};
  double log_q{}, log_p{};  // at the label

  DEVICE PairRow(const PairRowsParams& p, int64_t row, bool valid) {
    if (!valid) return;
    const int from = p.rows.row[row];
    lse = static_cast<double>(p.out.lse[from]) + p.out.lse_low[from];
    teacher_lse = static_cast<double>(p.out.teacher_lse[from]) + p.out.teacher_low[from];
    divergence = p.out.divergence[from];
    mean = p.out.mean[from];
    log_q = p.target[row] - lse;
    log_p = p.teacher_target[row] - teacher_lse;
  }
};

// A strip of a row, without the label's column.
struct PairStrip {
  double peak, teacher_peak;  // q and p at the maxima
  double q, p;                // their sums
  double offset;              // max s - max t

  DEVICE PairStrip(const PairPlanes& s, const PairRow& row, int64_t at) {
    peak = exp(s.max[at] - row.lse);
    teacher_peak = exp(s.teacher_max[at] - row.teacher_lse);
    q = peak * s.sum[at];
    p = teacher_peak * s.teacher_sum[at];
    offset = static_cast<double>(base_of(s.max[at])) - base_of(s.teacher_max[at]);
  }
};

constexpr int kPairSums = 2;
struct PairRowShared {
  double part[kPairSums][kCombineWarps][kCombineRows];

  // Adds the warps' parts to those of warp 0, whose lanes get the sum.
  DEVICE double sum(int index, double mine) {
    part[index][simt::warp_idx()][simt::lane_idx()] = mine;
    simt::sync_block();
    double total = 0;
    for (int w = 0; w < kCombineWarps; ++w) total += part[index][w][simt::lane_idx()];
    return total;
  }
};

DEVICE float not_negative(double x) { return x < 0 ? 0.0f : static_cast<float>(x); }

// Rows as in combine_kernel.
KERNEL void pair_rows_kernel(PairRowsParams p) {
  PairRowShared& s = *simt::shared<PairRowShared>();
  const int64_t row = int64_t{simt::block_idx()} * kCombineRows + simt::lane_idx();
  const bool valid = row < *p.rows.count, forward = p.kind == Kind::kForwardKl;
  double total = 0, mean = 0;
  const PairRow r(p, row, valid);
  for (int t = simt::warp_idx(); t < p.tiles && valid; t += kCombineWarps) {
    const int64_t at = t * p.N + row;
    if (needs_lse(p.kind)) {
      total += p.strips.value[at];
      mean += p.strips.mean[at];
      continue;
    }
    const PairStrip strip(p.strips, r, at);
    const double cross = p.strips.cross[at];
    if ((forward ? strip.p : strip.q) == 0) continue;
    total += forward ? strip.teacher_peak * cross - strip.p * strip.offset
                     : strip.peak * cross + strip.q * strip.offset;
  }
  total = s.sum(0, total);
  mean = s.sum(1, mean);
  if (simt::warp_idx() > 0 || !valid) return;
  const int to = p.rows.row[row];
  if (!needs_lse(p.kind)) {
    const double distance = static_cast<double>(p.target[row]) - p.teacher_target[row];
    const double weight = exp(forward ? r.log_p : r.log_q), shift = r.lse - r.teacher_lse;
    const double sign = forward ? -1 : 1;
    if (weight != 0) total += sign * weight * distance;
    total -= sign * shift;
    mean = forward ? 0 : not_negative(total);
  }
  // a row that has a label outside the vocabulary has no divergence either
  const bool labelled = p.rows.label[row] != kInvalid;
  p.out.divergence[to] = labelled ? not_negative(total) : static_cast<float>(NAN);
  p.out.mean[to] = static_cast<float>(mean);
  p.out.size[to] = exact_size(p.out.divergence[to]);
}

KERNEL void clear_pair_rows_kernel(PairRowsParams p) {
  const int64_t i = int64_t{simt::block_idx()} * kCombineThreads + simt::thread_idx();
  if (i >= p.N) return;
  for (float* to : {p.out.divergence, p.out.nll, p.out.lse, p.out.teacher_nll, p.out.lse_low,
                    p.out.teacher_lse, p.out.teacher_low, p.out.mean, p.out.size}) {
    to[i] = 0.0f;
  }
}

// sum w (x + k)^2 from the sums of w x^2, w x and w, with room for their rounding.
DEVICE double squares(double xx, double x, double one, double k) {
  return fmax(xx + 2 * k * x + k * k * one, 0.0) + kPairRounding * (xx + k * k * one);
}

// Of a strip: a bound of sum |g| and sum g^2. sum |g| <= sqrt(sum q  sum q (h - mean)^2).
struct PairShare {
  double mass, energy;
};
DEVICE PairShare share_of(const PairRowsParams& p, const PairRow& r, PairStrip strip, int64_t at,
                          bool label_here) {
  const PairPlanes& s = p.strips;
  double m[kMoments];
  for (int i = 0; i < kMoments; ++i) m[i] = s.moment[i][at];
  const double q = exp(r.log_q);
  if (p.kind == Kind::kForwardKl) {
    const double energy =
        squares(strip.peak * strip.peak * m[0], -strip.peak * strip.teacher_peak * m[1],
                strip.teacher_peak * strip.teacher_peak * m[2], 1);
    const double g = label_here ? fabs(q - exp(r.log_p)) : 0;
    return {fmin(strip.q + strip.p, sqrt(kTile * energy)) + g, energy + g * g};
  }
  if (p.kind == Kind::kReverseKl) {
    const double k = strip.offset - (r.lse - r.teacher_lse) - r.mean;
    const double second = squares(strip.peak * m[0], strip.peak * s.cross[at], strip.q, k);
    const double energy = strip.peak * strip.peak * squares(m[3], m[2], m[1], k);
    const double g = label_here && q != 0 ? fabs(q * (r.log_q - r.log_p - r.mean)) : 0;
    return {sqrt(strip.q * second) + g, energy + g * g};
  }
  if (label_here) strip.q += q;  // as the moments have it
  const double second = squares(m[0], s.mean[at], strip.q, -r.mean);
  return {sqrt(strip.q * second), squares(m[3], m[2], m[1], -r.mean)};
}

KERNEL void pair_shares_kernel(PairRowsParams p) {
  PairRowShared& s = *simt::shared<PairRowShared>();
  const int64_t row = int64_t{simt::block_idx()} * kCombineRows + simt::lane_idx();
  const int64_t bounds = p.tiles * p.N;
  const bool valid = row < *p.rows.count;
  const PairRow r(p, row, valid);
  const int label = valid ? p.rows.label[row] : -1;
  double size = 0;
  for (int t = simt::warp_idx(); t < p.tiles && row < p.N; t += kCombineWarps) {
    const int64_t at = t * p.N + row;
    if (!valid) {
      p.masses[at] = p.masses[bounds + at] = 0.0f;
      continue;
    }
    const PairStrip strip(p.strips, r, at);
    const PairShare share = share_of(p, r, strip, at, label >= 0 && label / kTile == t);
    p.masses[at] = static_cast<float>(strip.q);
    p.masses[bounds + at] = static_cast<float>(share.mass);
    p.strips.sum[at] = static_cast<float>(share.energy);
    size += share.mass;
  }
  size = s.sum(0, size);
  if (simt::warp_idx() == 0 && valid) p.out.size[p.rows.row[row]] = static_cast<float>(size);
}

// One block.
KERNEL void mean_size_kernel(PairRowsParams p) {
  double* s_sum = simt::shared<double>();
  const int t = simt::thread_idx(), count = *p.rows.count;
  double sum = 0;
  for (int r = t; r < count; r += kCombineThreads) sum += p.out.size[p.rows.row[r]];
  s_sum[t] = sum;
  simt::sync_block();
  if (t != 0) return;
  for (int i = 1; i < kCombineThreads; ++i) sum += s_sum[i];
  *p.mean_size = count > 0 ? static_cast<float>(sum / count) : 0.0f;
}

// What the filter would keep of rows of equal upstream gradient, at what error; for report_kernel.
KERNEL void pair_tally_kernel(PairRowsParams p) {
  MassShared& s = *simt::shared<MassShared>();
  const int thread = simt::thread_idx();
  const int64_t row = int64_t{simt::block_idx()} * kCombineRows + simt::lane_idx();
  const float* bounds = p.masses + p.tiles * p.N;
  float kept[kCandidates] = {}, noise[kCandidates] = {}, energy = 0.0f;
  if (row < *p.rows.count) {
    const int label = p.rows.label[row];
    const float reference = fminf(p.out.size[p.rows.row[row]], *p.mean_size);
    for (int t = simt::warp_idx(); t < p.tiles; t += kCombineWarps) {
      const int64_t at = t * p.N + row;
      const bool here = label >= 0 && label / kTile == t;
      const float squared = p.strips.sum[at];
      energy += squared;
      UNROLL
      for (int i = 0; i < kCandidates; ++i) {
        const float u = bounds[at] / (static_cast<float>(tau_of(p.eps, i)) * reference);
        const bool certain = here || is_certain(u);
        kept[i] += certain ? 1.0f : u;
        noise[i] += certain || u == 0.0f ? 0.0f : squared * (1.0f / u - 1.0f);
      }
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

}  // namespace gemma_ext::cce::cuda
