// SPDX-License-Identifier: Apache-2.0
// What is known of two heads strip by strip, and of their rows.
#pragma once

#include <cmath>
#include <utility>

#include "gradients.h"

namespace gemma_ext::cce::cpu {

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

inline double base(float max) { return max == -INFINITY ? 0 : max; }

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

// Masses [2, tiles, N], sizes, and what the filter does with rows of equal upstream gradient (sampling.h).
FilterReport draw_by(const PairRows&, const Strips&, Rows&, float* masses, int64_t N, double eps,
                     Workers&);

}  // namespace gemma_ext::cce::cpu
