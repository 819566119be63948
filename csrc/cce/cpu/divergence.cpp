// SPDX-License-Identifier: Apache-2.0
// Divergence of two heads on the CPU (divergence.h): one sweep over both heads for the sums of either KL, two for
// JSD and TVD; rows in a fixed order; the backward as the loss's.
#include <algorithm>
#include <cmath>
#include <utility>

#include "gradients.h"

namespace gemma_ext::cce::cpu {
namespace {

// The exact form computes the same strips one by one.
constexpr double kBreakEven = 0.9;

struct PairRows : ValidRows {
  Problem teacher;
  ProblemPair pair;

  explicit PairRows(const TwoHeads& h) : ValidRows(h.student), teacher(problem) {
    const Head& t = h.teacher;
    teacher.e = {t.e, t.dtype, t.N, t.D, t.e_stride, t.e_step};
    teacher.c = {t.c, t.dtype, t.V, t.D, t.c_stride, t.c_step};
    teacher.bias = t.bias;
    teacher.D = t.D;
    teacher.map = t.map;
    pair = {&problem, &teacher, h.kind, h.beta};
  }
};

// f(tile, row0, row1, scratch) over all strips; few tiles split the rows too.
template <class F>
void each_tile(const Problem& p, Workers& workers, F f) {
  const int64_t wanted = 4 * workers.threads();
  const int64_t parts = std::clamp<int64_t>(ceil_div(wanted, p.tiles), 1, spans(p.n) + 1);
  const int64_t part = ceil_div(p.n, parts);
  workers.run(p.n ? p.tiles * parts : 0, [&](int64_t task, Scratch& s) {
    const int64_t row = task % parts * part;
    if (row < p.n) f(task / parts, row, std::min(p.n, row + part), s);
  });
}

// What the forward knows of every strip, [tiles, n] each, and of every row, [n] each.
struct Strips {
  std::vector<float> planes;
  std::vector<float> target, teacher_target;
  PairStats pair{};
  MeanStats mean{};

  Strips(const Problem& p, Kind kind, bool masses) : target(p.n), teacher_target(p.n) {
    const int64_t plane = p.tiles * p.n;
    planes.resize((needs_lse(kind) ? 6 : 5) * plane + (masses ? 4 * plane : 0));
    float* next = planes.data();
    const auto take = [&] { return std::exchange(next, next + plane); };
    pair.max = take();
    pair.sum = take();
    pair.teacher_max = take();
    pair.teacher_sum = take();
    pair.target = target.data();
    pair.teacher_target = teacher_target.data();
    if (needs_lse(kind)) {
      mean.value = take();
      mean.mean = take();
    } else {
      pair.cross = take();
    }
    if (masses)
      for (float*& moment : needs_lse(kind) ? mean.moment : pair.moment) moment = take();
  }
};

struct Rows {
  RowResults student, teacher;
  std::vector<float> divergence, mean, size;

  explicit Rows(int64_t n) : student(n), teacher(n), divergence(n), mean(n), size(n) {}

  double lse(int64_t r) const { return double(student.lse[r]) + student.lse_low[r]; }
  double teacher_lse(int64_t r) const { return double(teacher.lse[r]) + teacher.lse_low[r]; }
};

double base(float max) { return max == -INFINITY ? 0 : max; }

// A strip of a row, without the label's column.
struct Strip {
  double peak, teacher_peak;  // q and p at the maxima
  double q, p;                // their sums
  double offset;              // max s - max t

  Strip(const PairStats& stats, const Rows& rows, int64_t at, int64_t r) {
    peak = std::exp(stats.max[at] - rows.lse(r));
    teacher_peak = std::exp(stats.teacher_max[at] - rows.teacher_lse(r));
    q = peak * stats.sum[at];
    p = teacher_peak * stats.teacher_sum[at];
    offset = base(stats.max[at]) - base(stats.teacher_max[at]);
  }
};

// The label's column of a row that has one.
struct LabelColumn {
  double log_q, log_p, q, p;

  LabelColumn(const PairStats& stats, const Rows& rows, int64_t r)
      : log_q(stats.target[r] - rows.lse(r)),
        log_p(stats.teacher_target[r] - rows.teacher_lse(r)),
        q(std::exp(log_q)),
        p(std::exp(log_p)) {}

  // g of either KL.
  double gradient(Kind kind, double divergence) const {
    return kind == Kind::kForwardKl ? q - p : q == 0 ? 0 : q * (log_q - log_p - divergence);
  }
};

// What is left of rounding below 0 is 0; NaN stays.
float not_negative(double x) { return x < 0 ? 0.0f : float(x); }

void sum_kl(const PairRows& valid, const Strips& strips, Rows& rows, Workers& workers) {
  const Problem& p = valid.problem;
  const bool forward = valid.pair.kind == Kind::kForwardKl;
  workers.run(spans(p.n), [&](int64_t span, Scratch&) {
    for (int64_t r = span * kRowSpan; r < std::min(p.n, (span + 1) * kRowSpan); ++r) {
      double total = 0;
      for (int64_t t = 0; t < p.tiles; ++t) {
        const Strip strip(strips.pair, rows, t * p.n + r, r);
        const double cross = strips.pair.cross[t * p.n + r];
        if ((forward ? strip.p : strip.q) == 0) continue;
        total += forward ? strip.teacher_peak * cross - strip.p * strip.offset
                         : strip.peak * cross + strip.q * strip.offset;
      }
      const LabelColumn label(strips.pair, rows, r);
      const double distance = double(strips.target[r]) - strips.teacher_target[r];
      if ((forward ? label.p : label.q) != 0)
        total += forward ? label.p * -distance : label.q * distance;
      const double shift = rows.lse(r) - rows.teacher_lse(r);
      rows.divergence[r] = not_negative(total + (forward ? shift : -shift));
      if (!forward) rows.mean[r] = rows.divergence[r];
    }
  });
}

void sum_means(const PairRows& valid, Strips& strips, Rows& rows, Workers& workers) {
  const Problem& p = valid.problem;
  MeanStats& stats = strips.mean;
  stats.lse = rows.student.lse.data();
  stats.lse_low = rows.student.lse_low.data();
  stats.teacher_lse = rows.teacher.lse.data();
  stats.teacher_low = rows.teacher.lse_low.data();
  each_tile(p, workers, [&](int64_t t, int64_t row0, int64_t row1, Scratch& s) {
    kernels().mean_tile(valid.pair, stats, t, row0, row1, s);
  });
  workers.run(spans(p.n), [&](int64_t span, Scratch&) {
    for (int64_t r = span * kRowSpan; r < std::min(p.n, (span + 1) * kRowSpan); ++r) {
      double value = 0, mean = 0;
      for (int64_t t = 0; t < p.tiles; ++t) {
        value += stats.value[t * p.n + r];
        mean += stats.mean[t * p.n + r];
      }
      rows.divergence[r] = not_negative(value);
      rows.mean[r] = float(mean);
    }
  });
}

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

// Masses, sizes, and what the filter does with rows of equal upstream gradient (sampling.h).
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

// G's coefficients of one row (kernels.h), compact.
struct Coefficients {
  std::vector<float> lse, lse_low, teacher_lse, teacher_low, mean, a, at_label, d, scale;

  Coefficients(const PairRows& valid, const DivergenceBackward& b)
      : lse(valid.gather(b.rows.lse)),
        lse_low(valid.gather(b.rows.lse_low)),
        teacher_lse(valid.gather(b.rows.teacher_lse)),
        teacher_low(valid.gather(b.rows.teacher_low)),
        mean(valid.gather(b.rows.mean)),
        a(valid.gather(b.d_lse)),
        at_label(a.size()),
        d(valid.gather(b.d_divergence)),
        scale(a.size()) {
    const std::vector<float> nll = valid.gather(b.rows.nll), size = valid.gather(b.rows.size);
    const std::vector<float> d_nll = valid.gather(b.d_nll);
    for (size_t r = 0; r < a.size(); ++r) {
      a[r] += d_nll[r];
      // of p near 1, p - 1 would lose what nll still knows
      at_label[r] = a[r] * std::expm1(-nll[r]) + (a[r] - d_nll[r]);
      scale[r] = std::max(std::fabs(a[r]), std::fabs(d_nll[r])) + std::fabs(d[r]) * size[r];
      if (std::isnan(scale[r])) scale[r] = INFINITY;
    }
  }
};

}  // namespace

Status run(const DivergenceForward& f, Workers& workers) {
  const PairRows valid(f.heads);
  if (!valid.status.ok()) return valid.status;
  const Problem& p = valid.problem;
  Strips strips(p, f.heads.kind, f.masses);
  each_tile(p, workers, [&](int64_t t, int64_t row0, int64_t row1, Scratch& s) {
    kernels().pair_tile(valid.pair, strips.pair, t, row0, row1, s);
  });
  Rows rows(p.n);
  StripStats mine{}, theirs{};
  mine.max = strips.pair.max;
  mine.sum = strips.pair.sum;
  mine.target = strips.pair.target;
  theirs.max = strips.pair.teacher_max;
  theirs.sum = strips.pair.teacher_sum;
  theirs.target = strips.pair.teacher_target;
  combine(p, mine, rows.student, workers);
  combine(valid.teacher, theirs, rows.teacher, workers);
  if (needs_lse(f.heads.kind))
    sum_means(valid, strips, rows, workers);
  else
    sum_kl(valid, strips, rows, workers);

  FilterReport report;
  if (f.masses) {
    report = draw_by(valid, strips, rows, f.masses, f.heads.student.N, f.eps, workers);
    for (int plane = 0; plane < 2; ++plane)
      spread(f.masses + plane * p.tiles * f.heads.student.N, p.tiles, p.n, f.heads.student.N);
  } else {
    // every strip of every row that has a gradient
    std::fill(rows.size.begin(), rows.size.end(), 1.0f);
  }
  const double summary[] = {report.kept, report.error, report.tau};
  std::copy(summary, summary + 3, f.summary);
  valid.scatter(rows.divergence, f.out.divergence, 0.0f);
  valid.scatter(rows.student.nll, f.out.nll, 0.0f);
  valid.scatter(rows.student.lse, f.out.lse, 0.0f);
  valid.scatter(rows.student.lse_low, f.out.lse_low, 0.0f);
  valid.scatter(rows.teacher.nll, f.out.teacher_nll, 0.0f);
  valid.scatter(rows.teacher.lse, f.out.teacher_lse, 0.0f);
  valid.scatter(rows.teacher.lse_low, f.out.teacher_low, 0.0f);
  valid.scatter(rows.mean, f.out.mean, 0.0f);
  valid.scatter(rows.size, f.out.size, 0.0f);
  return {};
}

Status run(const DivergenceBackward& b, Workers& workers) {
  const PairRows valid(b.heads);
  if (!valid.status.ok()) return valid.status;
  const Problem& p = valid.problem;
  const Gradients out = wanted(valid, b.out);
  if (p.n == 0) return {};
  const Coefficients c(valid, b);
  const PairCoefficients rows{c.lse.data(),         c.lse_low.data(), c.teacher_lse.data(),
                              c.teacher_low.data(), c.mean.data(),    c.a.data(),
                              c.at_label.data(),    c.d.data()};
  const Plan plan = draw({b.masses, b.heads.student.N, b.summary ? float(b.summary[2]) : 0, b.seed,
                          c.lse.data(), c.scale.data(), c.a.data(), c.d.data()},
                         p, workers);
  add_gradients(
      p, plan, {}, out,
      [&](const GradTask& t, int64_t tile, Scratch& s) {
        kernels().pair_grad_tile(t, valid.pair, rows, tile, s);
      },
      workers);
  return {};
}

}  // namespace gemma_ext::cce::cpu
