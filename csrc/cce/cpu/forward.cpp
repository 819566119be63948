// SPDX-License-Identifier: Apache-2.0
// Forward on the CPU: tiles in parallel, then one fixed-order combination per row.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "rows.h"

namespace gemma_ext::cce::cpu {

void combine(const Problem& p, const StripStats& stats, RowResults& out, Workers& workers) {
  workers.run(spans(p.n), [&](int64_t span, Scratch&) {
    const int64_t row0 = span * kRowSpan, rows = std::min(kRowSpan, p.n - row0);
    float top[kRowSpan];
    double total[kRowSpan] = {}, weighted[kRowSpan] = {}, classes[kRowSpan] = {};
    double squares[kRowSpan] = {}, sums[kRowSpan] = {};
    std::fill(top, top + rows, -INFINITY);
    for (int64_t t = 0; t < p.tiles; ++t) {
      const int64_t at = t * p.n + row0;
      for (int64_t r = 0; r < rows; ++r) {
        const float x = stats.max[at + r];
        if (p.want_argmax && (x > top[r] || (x == top[r] && stats.argmax[at + r] >= 0 &&
                                             stats.argmax[at + r] < out.argmax[row0 + r])))
          out.argmax[row0 + r] = stats.argmax[at + r];
        top[r] = x > top[r] ? x : top[r];
      }
    }
    for (int64_t t = 0; t < p.tiles; ++t) {
      const int64_t at = t * p.n + row0;
      for (int64_t r = 0; r < rows; ++r) {
        const float x = stats.max[at + r];
        const double factor = x == -INFINITY ? 0 : std::exp(x - top[r]);
        total[r] += stats.sum[at + r] * factor;
        if (p.want_mean) weighted[r] += stats.weighted[at + r] * factor;
        if (p.class_weight) classes[r] += stats.class_sum[at + r];
        if (!stats.total) continue;
        squares[r] += stats.square[at + r] * factor * factor;
        sums[r] += stats.total[at + r];
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = row0 + r;
      const bool labelled = p.label[row] >= 0 && stats.target[row] != -INFINITY;
      const double rivals = total[r],
                   label = labelled ? std::exp(double(stats.target[row]) - top[r]) : 0;
      total[r] += label;
      if (p.want_mean && labelled) weighted[r] += label * stats.target[row];
      const double log_total = std::log(total[r]), lse = top[r] + log_total;
      out.lse[row] = float(lse);
      out.lse_low[row] = std::isfinite(out.lse[row]) ? float(lse - out.lse[row]) : 0.0f;
      out.nll[row] = float(p.label[row] < 0              ? lse
                           : stats.target[row] == top[r] ? std::log1p(rivals)
                                                         : lse - stats.target[row]);
      if (p.want_mean) out.mean[row] = float(weighted[r] / total[r]);
      if (p.class_weight) out.class_sum[row] = float(classes[r]);
      if (!stats.total) continue;
      out.log_squares[row] = float(std::log(squares[r] + label * label) - 2 * log_total);
      out.average[row] = float(sums[r] / double(p.V));
    }
  });
}

void spread(float* plane, int64_t tiles, int64_t n, int64_t N) {
  for (int64_t t = tiles - 1; t >= 0; --t) {
    std::memmove(plane + t * N, plane + t * n, n * sizeof(float));
    std::fill(plane + t * N + n, plane + (t + 1) * N, 0.0f);
  }
}

namespace {

// Recomputing strips costs more than the exact form above this share of them.
constexpr double kBreakEven = 0.6;

// Masses in place of stats.slope, [tiles, n], and reaches, and what the filter does with them (sampling.h).
FilterReport draw_by(const Problem& p, const StripStats& stats, const RowResults& rows,
                     float* reaches, double eps, Workers& workers) {
  struct Tally {
    double kept[kCandidates] = {}, noise[kCandidates] = {}, energy = 0;
  };
  float tau[kCandidates];
  for (int i = 0; i < kCandidates; ++i) tau[i] = float(tau_of(eps, i));
  std::vector<Tally> tallies(spans(p.n));
  workers.run(spans(p.n), [&](int64_t span, Scratch&) {
    const int64_t row0 = span * kRowSpan, row1 = std::min(p.n, row0 + kRowSpan);
    Tally& tally = tallies[span];
    for (int64_t t = 0; t < p.tiles; ++t)
      for (int64_t row = row0; row < row1; ++row) {
        const int64_t at = t * p.n + row;
        const float peak = std::exp((stats.max[at] - rows.lse[row]) - rows.lse_low[row]);
        const float mass = peak * stats.slope[at];
        stats.slope[at] = mass;
        if (p.want_mean)
          reaches[at] = mass * std::max(1.0f, std::fabs(stats.max[at] - rows.mean[row]));
        const bool here = p.label[row] >= 0 && p.label[row] / kTile == t;
        const double miss = here ? -std::expm1(-double(rows.nll[row])) : 0;
        const double energy = double(peak) * peak * stats.square[at];  // sum p^2
        const double spread = mass > 0 ? energy / mass : 0;
        tally.energy += here ? miss * miss : energy;
        for (int i = 0; i < kCandidates; ++i) {
          tally.kept[i] += here ? 1.0f : std::min(1.0f, mass / tau[i]);
          tally.noise[i] += here ? 0 : spread * std::max(tau[i] - mass, 0.0f);
        }
      }
  });
  Tally all;
  for (const Tally& tally : tallies) {
    all.energy += tally.energy;
    for (int i = 0; i < kCandidates; ++i) {
      all.kept[i] += tally.kept[i];
      all.noise[i] += tally.noise[i];
    }
  }
  return choose_tau(eps, kBreakEven, double(p.n) * double(p.tiles), all.kept, all.noise,
                    all.energy);
}

void forward_tiles(const Problem& p, StripStats stats, RowResults& out, Workers& workers) {
  std::vector<float> target(p.n), class_sum;
  std::vector<int64_t> argmax;
  stats.target = target.data();
  if (p.class_weight) {
    class_sum.resize(p.tiles * p.n);
    stats.class_sum = class_sum.data();
  }
  if (p.want_argmax) {
    argmax.resize(p.tiles * p.n);
    stats.argmax = argmax.data();
  }

  // few tiles: split the rows too, at the price of packing a tile once per part
  const int64_t groups = tile_groups(p), wanted = 4 * workers.threads();
  const int64_t parts = std::clamp<int64_t>((wanted + groups - 1) / groups, 1, spans(p.n) + 1);
  const int64_t part = (p.n + parts - 1) / parts;
  workers.run(p.n ? groups * parts : 0, [&](int64_t t, Scratch& s) {
    const int64_t row = t % parts * part, tile = t / parts * kForwardTiles;
    if (row < p.n)
      kernels().forward_tiles(p, stats, tile, std::min(p.tiles, tile + kForwardTiles), row,
                              std::min(p.n, row + part), s);
  });
  combine(p, stats, out, workers);
}

}  // namespace

Status run(const Forward& f, Workers& workers) {
  ValidRows valid(f.head);
  if (!valid.status.ok()) return valid.status;
  Problem& p = valid.problem;
  p.want_mean = f.out.mean;
  p.want_argmax = f.out.argmax;
  const int64_t plane = p.tiles * p.n;
  const bool moments = f.out.average, squares = f.masses || moments;
  std::vector<float> planes((2 + p.want_mean + squares + moments) * plane);
  float* next = planes.data();
  const auto take = [&](bool wanted) {
    return wanted ? std::exchange(next, next + plane) : nullptr;
  };
  StripStats strips{};
  float* const masses = static_cast<float*>(f.masses);
  strips.slope = masses;
  strips.max = take(true);
  strips.sum = take(true);
  strips.square = take(squares);
  strips.weighted = take(p.want_mean);
  strips.total = take(moments);
  RowResults out(p.n);
  forward_tiles(p, strips, out, workers);

  valid.scatter(out.nll, f.out.nll, 0.0f);
  valid.scatter(out.lse, f.out.lse, 0.0f);
  valid.scatter(out.lse_low, f.out.lse_low, 0.0f);
  if (f.out.mean) valid.scatter(out.mean, f.out.mean, 0.0f);
  if (f.out.class_sum) valid.scatter(out.class_sum, f.out.class_sum, 0.0f);
  if (f.out.argmax) valid.scatter(out.argmax, f.out.argmax, int64_t{-1});
  if (moments) {
    valid.scatter(out.log_squares, f.out.log_squares, 0.0f);
    valid.scatter(out.average, f.out.average, 0.0f);
  }
  FilterReport report;
  if (f.masses) {
    float* reaches = masses + p.tiles * f.head.N;
    report = draw_by(p, strips, out, reaches, f.eps, workers);
    spread(masses, p.tiles, p.n, f.head.N);
    if (p.want_mean) spread(reaches, p.tiles, p.n, f.head.N);
  }
  const double summary[] = {report.kept, report.error, report.tau};
  std::copy(summary, summary + 3, f.summary);
  return {};
}

}  // namespace gemma_ext::cce::cpu
