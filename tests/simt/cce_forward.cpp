// SPDX-License-Identifier: Apache-2.0
#include "cce/cuda/column_stats.cu"
#include "cce/cuda/forward.cu"
#include "cce/cuda/rows.cu"

#include "cce_data.h"

namespace {

namespace cce = cce_test::cce;
namespace cuda = cce_test::cuda;
using cce_test::Data;
using cce_test::ForwardRun;
using cce_test::kIgnore;
using cce_test::Options;

void near(double x, double y, double tolerance) {
  if (!(std::fabs(x - y) <= tolerance * (1 + std::fabs(y)))) {
    throw std::logic_error(simt::host::text("expected ", y, " got ", x));
  }
}

template <class T>
void forward_matches(const Options& options, double tolerance = 2e-5) {
  Data<T> d(options);
  d.remember();
  const double eps = 0x1p-7;
  const ForwardRun<T> run(d, eps);
  int64_t rows = 0, dropped_strips = 0;
  double dropped = 0, worst = 0;
  for (int64_t n = 0; n < d.o.N; ++n) {
    if (!d.valid(n)) {
      EXPECT(run.nll[n] == 0 && run.lse[n] == 0 && run.mean[n] == 0 && run.argmax[n] == -1);
      if (d.o.class_weight) EXPECT(run.class_sum[n] == 0);
      continue;
    }
    near(run.lse[n], d.lse_of[n], tolerance);
    if (d.has_label(n) || d.o.missing) {
      near(run.nll[n], d.lse_of[n] - (d.has_label(n) ? d.s[n][d.targets[n]] : 0.0), tolerance);
    } else {
      EXPECT(std::isnan(run.nll[n]));
    }
    near(run.mean[n], d.mean(n), 5 * tolerance);
    const double top = *std::max_element(d.s[n].begin(), d.s[n].end());
    near(d.s[n].at(run.argmax[n]), top, tolerance);
    if (d.o.class_weight) {
      double sum = 0;
      for (int64_t v = 0; v < d.o.V; ++v) sum += d.class_weight[v] * d.s[n][v];
      near(run.class_sum[n], sum, 100 * tolerance);
    }
    double of_row = 0;
    for (int64_t tile = 0; tile < d.tiles(); ++tile) {
      double largest = -INFINITY, sum = 0, slope = 0, weighted = 0;
      bool label = false;
      for (int64_t i = tile * 256; i < std::min(d.o.V, (tile + 1) * 256); ++i) {
        largest = std::max(largest, d.s[n][d.id(i)]);
        label |= d.targets[n] == d.id(i);
      }
      for (int64_t i = tile * 256; i < std::min(d.o.V, (tile + 1) * 256); ++i) {
        const double x = d.s[n][d.id(i)], p = std::exp(x - largest);
        sum += p;
        slope += p * d.slope(x);
        weighted += p * x;
      }
      const int64_t at = tile * d.o.N + rows, plane = d.tiles() * d.o.N;
      near(run.stats[at], largest, tolerance);
      near(run.stats[plane + at], sum, 2 * tolerance);
      near(run.stats[2 * plane + at], slope, 2 * tolerance);
      near(run.stats[3 * plane + at], weighted, 20 * tolerance);
      const double peak = std::exp(largest - d.lse_of[n]);
      const double miss = d.has_label(n) ? 1 - std::exp(d.s[n][d.targets[n]] - d.lse_of[n]) : 0;
      if (peak < eps && !(label && miss >= eps)) {
        ++dropped_strips;
        of_row += peak * sum;
      }
    }
    dropped += of_row;
    worst = std::max(worst, of_row);
    ++rows;
  }
  for (int64_t plane = 0; plane < 4 * d.tiles(); ++plane) {
    for (int64_t r = rows; r < d.o.N; ++r) EXPECT(run.stats[plane * d.o.N + r] == 0);
  }
  const bool whole = rows == 0;
  near(run.summary[0], whole ? 1 : 1 - dropped_strips / double(rows * d.tiles()), 1e-6);
  near(run.summary[1], whole ? 0 : dropped / rows, 1e-5);
  near(run.summary[2], worst, 1e-5);
  EXPECT(run.summary[3] == (d.o.N > 0 ? eps : 0));  // no memory for statistics: nothing to look at
}

template <class T>
void columns_match(int64_t max_rows) {
  Options options;
  options.N = 300;
  options.V = 130;
  options.order = true;
  Data<T> d(options);
  d.remember();
  const ForwardRun<T> run(d, 0);
  std::vector<float> count(d.o.V, NAN), prob(d.o.V, NAN);
  cce_test::run(
      cce::ColumnStats{d.head(), run.lse.data(), 0x1p-7f, max_rows, count.data(), prob.data()}, {});
  std::vector<int64_t> rows;
  for (int64_t n = 0; n < d.o.N; ++n) {
    if (d.valid(n)) rows.push_back(n);
  }
  const size_t step = (rows.size() + max_rows - 1) / max_rows;
  for (int64_t v = 0; v < d.o.V; ++v) {
    double hits = 0, mass = 0;
    for (size_t i = 0; i < rows.size(); i += step) {
      const double p = std::exp(d.s[rows[i]][v] - d.lse_of[rows[i]]);
      hits += p >= 0x1p-7;
      mass += p;
    }
    EXPECT(count[v] == hits);
    near(prob[v], mass, 1e-5);
  }
}

}  // namespace

CASE(cce_forward_bf16) {
  Options o;
  o.order = o.class_weight = o.missing = true;
  forward_matches<simt::bf16>(o);
}
CASE(cce_forward_wgmma) {
  Options o;
  o.class_weight = o.missing = true;
  o.N = 400;  // a cluster of two row blocks, one of one, and ignored rows
  o.D = 328;
  forward_matches<simt::bf16>(o);
  o.N = 3;
  o.V = 1;
  o.D = 8;
  forward_matches<simt::f16>(o);
}
CASE(cce_forward_by_mma) {
  simt::host::options.hopper = false;
  Options o;
  forward_matches<simt::f16>(o);
}
CASE(cce_forward_f16_without_cap) {
  Options o;
  o.softcap = 0;
  o.spread = 60;
  o.N = 129;
  o.V = 257;
  forward_matches<simt::f16>(o);
}
CASE(cce_forward_float) {
  Options o;
  o.D = 36;
  o.order = true;
  o.N = 70;
  forward_matches<float>(o, 5e-5);
}
CASE(cce_forward_float_far_above_the_cap) {
  Options o;
  o.D = 4;
  o.spread = 200;
  o.N = 20;
  forward_matches<float>(o, 2e-4);
}
CASE(cce_forward_below_the_cap) {
  Options o;
  o.softcap = 30;
  o.V = 256;
  o.bias = false;
  o.ignored = 0;
  forward_matches<simt::bf16>(o);
}
CASE(cce_forward_of_nothing) {
  Options o;
  o.ignored = 1;
  forward_matches<simt::bf16>(o);
  o.N = 0;
  forward_matches<simt::bf16>(o);
}
CASE(cce_forward_label_outside) {
  Options o;
  o.N = 9;
  Data<simt::bf16> d(o);
  d.targets[3] = o.V;
  d.targets[4] = -1;
  const ForwardRun<simt::bf16> run(d, 0, false, false);
  EXPECT(std::isnan(run.nll[3]) && std::isnan(run.nll[4]) && !std::isnan(run.nll[6]));
  EXPECT(!std::isnan(run.lse[3]));
}
CASE(cce_forward_of_certain_rows) {
  Options o;
  o.spread = 60;
  o.softcap = 0;
  o.N = 130;
  o.ignored = 0;
  for (const bool hopper : {true, false}) {
    simt::host::options.hopper = hopper;
    Data<simt::bf16> d(o);
    for (int64_t n = 0; n < o.N; ++n) {
      d.targets[n] = std::max_element(d.s[n].begin(), d.s[n].end()) - d.s[n].begin();
    }
    const ForwardRun<simt::bf16> run(d, 0, false, false);
    for (int64_t n = 0; n < o.N; ++n) EXPECT(run.nll[n] >= 0);
  }
}
CASE(cce_forward_of_nan) {
  Options o;
  o.N = 9;
  Data<simt::bf16> d(o);
  d.e[3 * o.D + 7] = simt::from_float<simt::bf16>(NAN);
  const ForwardRun<simt::bf16> run(d, 0, false, false);
  EXPECT(std::isnan(run.nll[3]) && std::isnan(run.lse[3]) && !std::isnan(run.lse[4]));
}
// Of the six thresholds the largest that is accurate, or none.
CASE(cce_forward_auto) {
  Options o;
  o.softcap = 0;
  o.spread = 300;
  o.V = 1024;
  const ForwardRun<simt::bf16> sharp(Data<simt::bf16>(o), cce::kAutoEps);
  EXPECT(sharp.summary[3] == 0x1p-10 && sharp.summary[0] < 0.6 && sharp.summary[1] > 0);
  o.spread = 0.1;
  const ForwardRun<simt::bf16> flat(Data<simt::bf16>(o), cce::kAutoEps);
  EXPECT(flat.summary[3] == 0 && flat.summary[0] == 1);
}
CASE(cce_columns_bf16) { columns_match<simt::bf16>(100); }
CASE(cce_columns_float) { columns_match<float>(1000); }
