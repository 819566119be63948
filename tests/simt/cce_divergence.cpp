// SPDX-License-Identifier: Apache-2.0
// Divergence of two heads under the checker: rows and gradients against float64, with memory for one chunk and for
// many. The kernels are those of forward.cu and backward.cu, which the files beside this one hold.
#include "cce_data.h"

namespace {

namespace cce = cce_test::cce;
namespace cuda = cce_test::cuda;
using cce::Kind;
using cce_test::Data;
using cce_test::error;
using cce_test::Options;

struct PairRequest {
  Kind kind = Kind::kForwardKl;
  double eps = 0;
  int64_t strip_bytes = int64_t{64} << 20;
  double tolerance = 1e-2;  // two roundings to bf16
  double beta = 0.3;
};

template <class T>
struct Heads {
  Data<T> student, teacher;

  explicit Heads(Options o, int64_t teacher_d = 56)
      : student(o), teacher(of_teacher(o, teacher_d), 2) {
    teacher.targets = student.targets;
    student.remember();
    teacher.remember();
  }
  static Options of_teacher(Options o, int64_t d) {
    o.D = d;
    o.scale = 0.5;
    return o;
  }
  bool valid(int64_t n) const { return student.valid(n); }
};

struct PairTruth {
  double divergence = 0, mean = 0;
  std::vector<double> g;  // d divergence / d s

  template <class T>
  PairTruth(const Heads<T>& h, const PairRequest& q, int64_t n) {
    const int64_t V = h.student.o.V;
    std::vector<double> hs(V);
    const auto log_q = [&](int64_t v) { return h.student.s[n][v] - h.student.lse_of[n]; };
    const auto log_p = [&](int64_t v) { return h.teacher.s[n][v] - h.teacher.lse_of[n]; };
    for (int64_t v = 0; v < V; ++v) {
      const double lq = log_q(v), lp = log_p(v), x = std::exp(lq), y = std::exp(lp);
      const double lm = std::log(q.beta * y + (1 - q.beta) * x);
      switch (q.kind) {
        case Kind::kForwardKl: divergence += y * (lp - lq); break;
        case Kind::kReverseKl:
          divergence += x * (lq - lp);
          hs[v] = lq - lp;
          break;
        case Kind::kJsd:
          divergence += q.beta * y * (lp - lm) + (1 - q.beta) * x * (lq - lm);
          hs[v] = (1 - q.beta) * (lq - lm);
          break;
        case Kind::kTvd:
          divergence += std::fabs(x - y) / 2;
          hs[v] = x > y ? 0.5 : -0.5;
          break;
      }
      mean += x * hs[v];
    }
    for (int64_t v = 0; v < V; ++v) {
      const double x = std::exp(log_q(v));
      g.push_back(q.kind == Kind::kForwardKl ? x - std::exp(log_p(v)) : x * (hs[v] - mean));
    }
  }
};

template <class T>
void pair_matches(const Options& options, const PairRequest& q) {
  const Heads<T> h(options);
  const Options& o = h.student.o;
  const int64_t N = o.N, V = o.V, D = o.D, plane = h.student.tiles() * N;
  std::vector<std::vector<float>> rows(9, std::vector<float>(N, NAN));
  std::vector<float> masses(q.eps > 0 ? 2 * plane : 0, NAN);
  std::vector<double> summary(3, NAN);

  cce::DivergenceForward f{};
  f.heads = {h.student.head(), h.teacher.head(), q.kind, float(q.beta)};
  f.out = {rows[0].data(), rows[1].data(), rows[2].data(), rows[3].data(), rows[4].data(),
           rows[5].data(), rows[6].data(), rows[7].data(), rows[8].data()};
  f.masses = q.eps > 0 ? masses.data() : nullptr;
  f.summary = summary.data();
  f.eps = q.eps;
  cce_test::run(f, {});
  EXPECT(summary[2] == q.eps);
  EXPECT(q.eps > 0 ? summary[0] < 1 : summary[0] == 1);

  std::vector<float> d_divergence, d_nll, d_lse;
  std::vector<double> de(N * D), dc(V * D), dbias(V);
  for (int64_t n = 0; n < N; ++n) {
    const float size = n % 4 == 1 ? 0.0f : std::ldexp(1e-3f, int(n % 5));
    d_divergence.push_back(size * float(1 + n % 3));
    d_nll.push_back(size * 0.4f);
    d_lse.push_back(size * -0.2f);
    if (!h.valid(n)) {
      for (const auto& row : rows) EXPECT(row[n] == 0);
      continue;
    }
    const PairTruth truth(h, q, n);
    const double label = h.student.s[n][h.student.targets[n]];
    const auto near = [](double x, double y) {
      if (!(std::fabs(x - y) <= 3e-5 * (1 + std::fabs(y))))
        throw std::logic_error(simt::host::text("expected ", y, " got ", x));
    };
    near(rows[0][n], truth.divergence);
    near(rows[1][n], h.student.lse_of[n] - label);
    near(rows[2][n], h.student.lse_of[n]);
    near(rows[3][n], h.teacher.lse_of[n] - h.teacher.s[n][h.student.targets[n]]);
    near(rows[5][n], h.teacher.lse_of[n]);
    if (q.kind != Kind::kForwardKl) near(rows[7][n], truth.mean);
    for (int64_t v = 0; v < V; ++v) {
      const double s = h.student.s[n][v], p = std::exp(s - h.student.lse_of[n]);
      double g = d_divergence[n] * truth.g[v] + (double(d_nll[n]) + d_lse[n]) * p;
      if (v == h.student.targets[n]) g -= d_nll[n];
      g *= h.student.slope(s);
      dbias[v] += g;
      for (int64_t d = 0; d < D; ++d) {
        de[n * D + d] += g * o.scale * cce_test::value_of(h.student.c[v * D + d]);
        dc[v * D + d] += g * o.scale * cce_test::value_of(h.student.e[n * D + d]);
      }
    }
  }

  const T poison = cce_test::rounded<T>(NAN);
  std::vector<T> found_de(N * D, poison), found_dc(V * D, poison);
  std::vector<float> found_dbias(V, NAN);
  cce::DivergenceBackward b{};
  b.heads = f.heads;
  b.rows = f.out;
  b.d_divergence = d_divergence.data();
  b.d_nll = d_nll.data();
  b.d_lse = d_lse.data();
  if (q.eps > 0) {
    b.masses = masses.data();
    b.summary = summary.data();
  }
  b.seed = 7;
  b.out = {found_de.data(), found_dc.data(), found_dbias.data()};
  cce_test::run(b, {.strip_bytes = q.strip_bytes});
  EXPECT(error(found_de, de) < q.tolerance);
  EXPECT(error(found_dc, dc) < q.tolerance);
  EXPECT(error(found_dbias, dbias) < q.tolerance);
}

}  // namespace

CASE(cce_divergence_forward_kl_bf16) { pair_matches<simt::bf16>({}, {}); }
CASE(cce_divergence_reverse_kl_f16) {
  pair_matches<simt::f16>({}, {.kind = Kind::kReverseKl, .tolerance = 2e-3});
}
CASE(cce_divergence_jsd_fp32_in_chunks) {
  Options o;
  o.N = 131;
  o.V = 530;
  pair_matches<float>(o, {.kind = Kind::kJsd, .strip_bytes = 1, .tolerance = 1e-4});
}
CASE(cce_divergence_tvd_bf16_without_cap) {
  Options o;
  o.softcap = 0;
  o.bias = false;
  o.ignored = 0;
  o.V = 300;
  pair_matches<simt::bf16>(o, {.kind = Kind::kTvd});
}
CASE(cce_divergence_no_row_counts) {
  Options o;
  o.ignored = 1;
  o.N = 20;
  o.V = 100;
  pair_matches<simt::bf16>(o, {.kind = Kind::kJsd});
}
CASE(cce_divergence_sampled) {
  Options o;
  o.N = 140;
  o.V = 1500;
  o.spread = 6;
  o.softcap = 0;
  for (const Kind kind : {Kind::kForwardKl, Kind::kReverseKl, Kind::kTvd}) {
    // an unbiased gradient of a few draws is off by their spread
    pair_matches<simt::bf16>(o, {.kind = kind, .eps = 0x1p-5, .tolerance = 0.3});
  }
}
