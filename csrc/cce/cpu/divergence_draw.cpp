// SPDX-License-Identifier: Apache-2.0
// What the filter of a divergence draws by.
#include <algorithm>
#include <cmath>

#include "divergence_rows.h"

namespace gemma_ext::cce::cpu {
namespace {

// The exact form computes the same strips one by one.
constexpr double kBreakEven = 0.9;

// Of a strip: a bound of sum |g| and sum g^2.
struct Share {
  double mass, energy;
};

// sum w (x + k)^2 from the sums of w x^2, w x and w, with room for their rounding.
double squares(double xx, double x, double one, double k) {
  return std::max(xx + 2 * k * x + k * k * one, 0.0) + kPairRounding * (xx + k * k * one);
}

Share share_of(const PairRows& valid, const Strips& strips, const Rows& rows, const Strip& s,
               int64_t at, int64_t r) {
  const auto moment = [&](const MeanStats& m, int i) { return double(m.moment[i][at]); };
  if (valid.pair.kind == Kind::kForwardKl) {
    const PairStats& m = strips.pair;
    const double qq = s.peak * s.peak * m.moment[0][at];
    const double qp = s.peak * s.teacher_peak * m.moment[1][at];
    const double pp = s.teacher_peak * s.teacher_peak * m.moment[2][at];
    const double energy = squares(qq, -qp, pp, 1);
    return {std::min(s.q + s.p, std::sqrt(kTile * energy)), energy};
  }
  // sum |g| <= sqrt(sum q  sum q (h - mean)^2)
  if (valid.pair.kind == Kind::kReverseKl) {
    const PairStats& m = strips.pair;
    const double k = s.offset - (rows.lse(r) - rows.teacher_lse(r)) - rows.mean[r];
    const double second = squares(s.peak * m.moment[0][at], s.peak * m.cross[at], s.q, k);
    const double energy =
        s.peak * s.peak * squares(m.moment[3][at], m.moment[2][at], m.moment[1][at], k);
    return {std::sqrt(s.q * second), energy};
  }
  const MeanStats& m = strips.mean;
  const double k = -double(rows.mean[r]);
  const double second = squares(moment(m, 0), m.mean[at], s.q, k);
  return {std::sqrt(s.q * second), squares(moment(m, 3), moment(m, 2), moment(m, 1), k)};
}

}  // namespace

FilterReport draw_by(const PairRows& valid, const Strips& strips, Rows& rows, float* masses,
                     int64_t N, double eps, Workers& workers) {
  struct Tally {
    double kept[kCandidates] = {}, noise[kCandidates] = {}, energy = 0;
  };
  const Problem& p = valid.problem;
  const Kind kind = valid.pair.kind;
  float* const bounds = masses + p.tiles * N;
  std::vector<float> energies(p.tiles * p.n);
  workers.run(spans(p.n), [&](int64_t span, Scratch&) {
    for (int64_t r = span * kRowSpan; r < std::min(p.n, (span + 1) * kRowSpan); ++r) {
      double size = 0;
      for (int64_t t = 0; t < p.tiles; ++t) {
        const int64_t at = t * p.n + r;
        Strip strip(strips.pair, rows, at, r);
        const bool here = p.label[r] / kTile == t;
        const LabelColumn label(strips.pair, rows, r);
        if (here && needs_lse(kind)) strip.q += label.q;  // as their moments have it
        Share share = share_of(valid, strips, rows, strip, at, r);
        if (here && !needs_lse(kind)) {
          const double g = label.gradient(kind, rows.divergence[r]);
          share = {share.mass + std::fabs(g), share.energy + g * g};
        }
        masses[at] = float(strip.q);
        bounds[at] = float(share.mass);
        energies[at] = float(share.energy);
        size += share.mass;
      }
      rows.size[r] = float(size);
    }
  });
  double total = 0;
  for (float size : rows.size) total += size;
  const double mean_size = p.n ? total / double(p.n) : 0;
  std::vector<Tally> tallies(spans(p.n));
  workers.run(spans(p.n), [&](int64_t span, Scratch&) {
    Tally& tally = tallies[span];
    for (int64_t r = span * kRowSpan; r < std::min(p.n, (span + 1) * kRowSpan); ++r) {
      const double reference = std::min(double(rows.size[r]), mean_size);
      for (int64_t t = 0; t < p.tiles; ++t) {
        const int64_t at = t * p.n + r;
        const bool here = p.label[r] / kTile == t;
        tally.energy += energies[at];
        for (int i = 0; i < kCandidates; ++i) {
          const double u = bounds[at] / (tau_of(eps, i) * reference);
          const bool certain = here || !(u < 1);
          tally.kept[i] += certain ? 1 : u;
          tally.noise[i] += certain || u == 0 ? 0 : energies[at] * (1 / u - 1);
        }
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

}  // namespace gemma_ext::cce::cpu
