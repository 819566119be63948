// SPDX-License-Identifier: Apache-2.0
// Divergence of two heads on the CPU (divergence.h): one sweep over both heads for the sums of either KL, two for
// JSD and TVD; rows in a fixed order; the backward as the loss's.
#include <algorithm>
#include <cmath>

#include "divergence_rows.h"

namespace gemma_ext::cce::cpu {
namespace {

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
    std::transform(rows.divergence.begin(), rows.divergence.end(), rows.size.begin(), exact_size);
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
