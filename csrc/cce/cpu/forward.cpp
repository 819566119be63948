// SPDX-License-Identifier: Apache-2.0
// Forward on the CPU: tiles in parallel, then one fixed-order combination per row.
#include <algorithm>
#include <cmath>

#include "rows.h"

namespace gemma_ext::cce::cpu {

StripStats stat_planes(float* memory, const Problem& p) {
  const int64_t plane = p.tiles * p.n;
  return {memory,
          memory + plane,
          memory + 2 * plane,
          p.want_mean ? memory + 3 * plane : nullptr,
          nullptr,
          nullptr,
          nullptr};
}

void combine(const Problem& p, const StripStats& stats, RowResults& out, Workers& workers) {
  workers.run(spans(p.n), [&](int64_t span, Scratch&) {
    const int64_t row0 = span * kRowSpan, rows = std::min(kRowSpan, p.n - row0);
    float top[kRowSpan];
    double total[kRowSpan] = {}, weighted[kRowSpan] = {}, classes[kRowSpan] = {};
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
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = row0 + r;
      const double lse = top[r] + std::log(total[r]);
      out.lse[row] = float(lse);
      out.nll[row] = float(p.position[row] >= 0 ? lse - stats.target[row] : lse);
      if (p.want_mean) out.mean[row] = float(weighted[r] / total[r]);
      if (p.class_weight) out.class_sum[row] = float(classes[r]);
    }
  });
}

namespace {

// What the filter keeps when every row has the same weight.
struct FilterReport {
  double kept = 1, dropped_mean = 0, dropped_max = 0, eps = 0;
};

FilterReport report(const Problem& p, const StripStats& stats, const RowResults& rows, double eps,
                    Workers& workers) {
  // Auto takes the largest of 2^-10 .. 2^-15 whose predicted gradient error is below kError. After
  // compensation the entries p of a dropped strip remain as noise of energy sum p^2, at most
  // peak * mass; the whole gradient has about (1 - p_label)^2 plus the peaks squared. The true error
  // was 1.1 to 2 times this prediction on planted power laws and at random initialisation, so 2^-9
  // keeps it under the 2^-8 of one bfloat16 rounding. Above kBreakEven of the strips, recomputing
  // them costs more than the exact form.
  constexpr int kCandidates = 6;
  constexpr double kError = 0x1p-9, kBreakEven = 0.6;
  const bool automatic = eps == kAutoEps;
  const int candidates = automatic ? kCandidates : 1;
  double threshold[kCandidates];
  for (int i = 0; i < candidates; ++i) threshold[i] = automatic ? std::ldexp(1.0, -10 - i) : eps;

  struct Tally {
    double dropped[kCandidates] = {}, worst[kCandidates] = {}, noise[kCandidates] = {};
    double energy = 0;
    int64_t strips[kCandidates] = {};
  };
  std::vector<Tally> tallies(spans(p.n));
  workers.run(spans(p.n), [&](int64_t span, Scratch&) {
    const int64_t row0 = span * kRowSpan, count = std::min(kRowSpan, p.n - row0);
    Tally& tally = tallies[span];
    std::vector<double> mass(count * candidates);
    for (int64_t t = 0; t < p.tiles; ++t)
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = row0 + r, at = t * p.n + row;
        const double peak = std::exp(stats.max[at] - rows.lse[row]);
        const bool target = p.position[row] >= 0 && p.position[row] / kTile == t;
        const double miss = target ? -std::expm1(-double(rows.nll[row])) : 0;
        tally.energy += target ? miss * miss : peak * peak;
        for (int i = 0; i < candidates; ++i)
          if (peak < threshold[i] && !(target && miss >= threshold[i])) {
            mass[r * candidates + i] += peak * stats.sum[at];
            tally.noise[i] += peak * peak * stats.sum[at];
            ++tally.strips[i];
          }
      }
    for (int64_t r = 0; r < count; ++r)
      for (int i = 0; i < candidates; ++i) {
        tally.dropped[i] += mass[r * candidates + i];
        tally.worst[i] = std::max(tally.worst[i], mass[r * candidates + i]);
      }
  });

  for (int i = 0; i < candidates; ++i) {
    FilterReport result{.eps = threshold[i]};
    int64_t strips = 0;
    double noise = 0, energy = 0;
    for (const Tally& tally : tallies) {
      noise += tally.noise[i];
      energy += tally.energy;
      result.dropped_mean += tally.dropped[i];
      result.dropped_max = std::max(result.dropped_max, tally.worst[i]);
      strips += tally.strips[i];
    }
    if (p.n) {
      result.dropped_mean /= double(p.n);
      result.kept = 1 - double(strips) / (double(p.n) * double(p.tiles));
    }
    if (!automatic || (noise <= kError * kError * energy && result.kept <= kBreakEven))
      return result;
    if (result.kept > kBreakEven) break;
  }
  return {};
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
  const int64_t planes = kStatPlanes + p.want_mean, used = planes * p.tiles * p.n;
  // ignored rows have no strips: the rest is zero
  if (f.stats) std::fill(f.stats + used, f.stats + planes * p.tiles * f.head.N, 0.0f);
  std::vector<float> own(f.stats ? 0 : used);
  const StripStats strips = stat_planes(f.stats ? f.stats : own.data(), p);
  RowResults out(p.n);
  forward_tiles(p, strips, out, workers);

  valid.scatter(out.nll, f.out.nll, 0.0f);
  valid.scatter(out.lse, f.out.lse, 0.0f);
  if (f.out.mean) valid.scatter(out.mean, f.out.mean, 0.0f);
  if (f.out.class_sum) valid.scatter(out.class_sum, f.out.class_sum, 0.0f);
  if (f.out.argmax) valid.scatter(out.argmax, f.out.argmax, int64_t{-1});
  const FilterReport kept =
      f.stats && f.eps != 0 ? report(p, strips, out, f.eps, workers) : FilterReport{};
  const double summary[] = {kept.kept, kept.dropped_mean, kept.dropped_max, kept.eps};
  std::copy(summary, summary + 4, f.summary);
  return {};
}

Status run(const ColumnStats& c, Workers& workers) {
  ValidRows valid(c.head);
  if (!valid.status.ok()) return valid.status;
  Problem& p = valid.problem;
  const int64_t step = std::max<int64_t>(1, ceil_div(p.n, c.max_rows));
  std::vector<int64_t> sample;
  std::vector<float> lse;
  for (int64_t i = 0; i < p.n; i += step) {
    sample.push_back(valid.rows[i]);
    lse.push_back(c.lse[valid.rows[i]]);
  }
  p.rows = sample.data();
  p.n = int64_t(sample.size());
  workers.run(p.tiles, [&](int64_t tile, Scratch& s) {
    kernels().column_tile(p, lse.data(), c.eps, c.count, c.prob, tile, s);
  });
  return {};
}

}  // namespace gemma_ext::cce::cpu
