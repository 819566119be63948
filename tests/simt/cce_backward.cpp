// SPDX-License-Identifier: Apache-2.0
#include "cce/cuda/backward.cu"

#include "cce_data.h"

namespace {

namespace cce = cce_test::cce;
namespace cuda = cce_test::cuda;
using cce_test::Data;
using cce_test::error;
using cce_test::ForwardRun;
using cce_test::Options;

struct Request {
  double eps = 0;
  bool entropy = false, class_sum = false, profile = false;
  bool need_e = true, need_c = true, need_bias = true;
  int64_t strip_bytes = 64 << 20;
  double tolerance = 1e-2;  // two roundings to bf16
  double most_kept = 1;
  bool with_summary = false;   // of a forward that kept everything
  bool sparse_chunks = false;  // as little memory as the sparse form needs, less than for one chunk
};

// [N] each: d_nll, d_lse, d_mean, d_class, of very different sizes; one row has none.
struct Upstreams {
  std::vector<float> nll, lse, mean, classes;
  explicit Upstreams(int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const float size = i % 4 == 1 ? 0.0f : std::ldexp(1e-3f, int(i % 5));
      nll.push_back(size * float(1 + i % 3));
      lse.push_back(size * 0.3f);
      mean.push_back(size * 0.5f);
      classes.push_back(size * 0.1f);
    }
  }
};

// Gradients in float64, with dropped strips returned through tile means.
struct Truth {
  std::vector<double> de, dc, dbias;
  int64_t dropped = 0, kept = 0, label_kept = 0;

  template <class T>
  Truth(const Data<T>& d, const Request& q, const Upstreams& up)
      : de(d.o.N * d.o.D), dc(d.o.V * d.o.D), dbias(d.o.V) {
    double mean_scale = 0, rows = 0;
    const auto coefficient = [&](const std::vector<float>& x, bool wanted, int64_t n) {
      return wanted ? double(x[n]) : 0.0;
    };
    const auto scale_of = [&](int64_t n) {
      const double b = up.nll[n], dm = coefficient(up.mean, q.entropy, n);
      const double dk = coefficient(up.classes, q.class_sum, n);
      const double a = b + up.lse[n] + dm;
      return std::max(
          {std::fabs(a), d.has_label(n) ? std::fabs(b) : 0.0, std::fabs(dm), std::fabs(dk)});
    };
    for (int64_t n = 0; n < d.o.N; ++n) {
      if (d.valid(n)) mean_scale += scale_of(n), rows += 1;
    }
    mean_scale /= std::max(rows, 1.0);
    for (int64_t n = 0; n < d.o.N; ++n) {
      if (!d.valid(n)) continue;
      const double dm = coefficient(up.mean, q.entropy, n), mean = q.entropy ? d.mean(n) : 0;
      const double dk = coefficient(up.classes, q.class_sum, n);
      const double b = d.has_label(n) ? up.nll[n] : 0, a = double(up.nll[n]) + up.lse[n] + dm;
      const double threshold = q.eps * std::min(scale_of(n), mean_scale);
      if (scale_of(n) == 0) continue;
      for (int64_t first = 0; first < d.o.V; first += kTile) {
        const int64_t last = std::min(d.o.V, first + kTile);
        double top = -INFINITY, mass = 0, weight = 0;
        bool kept = false;
        for (int64_t i = first; i < last; ++i) {
          const double x = d.s[n][d.id(i)], p = std::exp(x - d.lse_of[n]);
          top = std::max(top, x);
          mass += p * d.slope(x) * a;
          weight += p;
          if (d.targets[n] == d.id(i) && std::fabs(a * p - b) >= threshold) kept = true;
        }
        const double bound = std::fabs(a) + std::fabs(dm) * std::max(std::fabs(top - mean), 1.0);
        label_kept += kept;
        kept |= std::exp(top - d.lse_of[n]) * bound >= threshold;
        if (q.eps == 0) kept = true;
        if (!kept && q.entropy) {
          double weighted = 0, slope = 0;
          for (int64_t i = first; i < last; ++i) {
            const double x = d.s[n][d.id(i)], p = std::exp(x - d.lse_of[n]);
            weighted += p * x;
            slope += p * d.slope(x);
          }
          mass = slope * (a + dm * (weighted / weight - mean));
        }
        (kept ? this->kept : dropped) += 1;
        double total = 0;
        for (int64_t i = first; i < last; ++i) total += q.profile ? d.prob[d.id(i)] : 1.0;
        for (int64_t i = first; i < last; ++i) {
          const int64_t v = d.id(i);
          const double x = d.s[n][v], p = std::exp(x - d.lse_of[n]);
          double g = mass * (q.profile ? d.prob[v] : 1.0) / total;
          if (kept) {
            g = p * (a + dm * (x - mean)) + (q.class_sum ? dk * d.class_weight[v] : 0.0);
            if (d.targets[n] == v) g -= b;
            g *= d.slope(x);
          }
          dbias[v] += g;
          for (int64_t j = 0; j < d.o.D; ++j) {
            de[n * d.o.D + j] += g * d.o.scale * cce_test::value_of(d.c[v * d.o.D + j]);
            dc[v * d.o.D + j] += g * d.o.scale * cce_test::value_of(d.e[n * d.o.D + j]);
          }
        }
      }
    }
  }
  static constexpr int64_t kTile = cce::kTile;
};

void close(const char* name, double found, double tolerance) {
  if (!(found <= tolerance)) {
    throw std::logic_error(simt::host::text("error of ", name, " is ", found));
  }
}

template <class T>
void gradients_match(const Options& options, const Request& q) {
  Data<T> d(options);
  d.remember();
  const Upstreams up(d.o.N);
  const Truth truth(d, q, up);
  const ForwardRun<T> rows(d, q.eps);
  std::vector<T> de(d.o.N * d.o.D, cce_test::rounded<T>(NAN));
  std::vector<T> dc(d.o.V * d.o.D, cce_test::rounded<T>(NAN));
  std::vector<float> dbias(d.o.V, NAN);
  cce::Backward b{};
  b.head = d.head();
  b.up = {rows.nll.data(),
          rows.lse.data(),
          rows.mean.data(),
          up.nll.data(),
          up.lse.data(),
          q.entropy ? up.mean.data() : nullptr,
          q.class_sum ? up.classes.data() : nullptr};
  b.stats = rows.stats.data();
  b.summary = q.eps > 0 || q.with_summary ? rows.summary.data() : nullptr;
  b.prob = q.profile ? d.prob.data() : nullptr;
  b.out = {q.need_e ? de.data() : nullptr, q.need_c ? dc.data() : nullptr,
           q.need_bias ? dbias.data() : nullptr};
  cuda::Memory memory{.strip_bytes = q.strip_bytes};
  if (q.sparse_chunks) {
    const int64_t capacity = d.o.N + truth.kept / 3 + 1;
    EXPECT(capacity < truth.kept);
    memory.strip_bytes = capacity * (256 * sizeof(T) + 256 * sizeof(float));
  }
  cce_test::run(b, memory);
  if (q.eps > 0) EXPECT(truth.dropped > 0 && truth.label_kept > 0);
  EXPECT(truth.kept <= q.most_kept * (truth.kept + truth.dropped));
  if (q.need_e) close("dE", error(de, truth.de), q.tolerance);
  if (q.need_c) close("dC", error(dc, truth.dc), q.tolerance);
  if (q.need_bias) close("dbias", error(dbias, truth.dbias), q.tolerance);
}

template <class T>
void fused_matches(const Options& options, bool gradients, double tolerance,
                   int64_t strip_bytes = 1) {
  Data<T> d(options);
  d.remember();
  Upstreams up(d.o.N);
  std::vector<float> z(d.o.N);
  double loss = 0;
  for (int64_t n = 0; n < d.o.N; ++n) {
    z[n] = 0.1f * up.nll[n];
    if (!d.valid(n)) continue;
    const double lse = d.lse_of[n];
    loss += up.nll[n] * (lse - d.s[n][d.targets[n]]) + z[n] * lse * lse;
    up.lse[n] = static_cast<float>(2 * z[n] * lse);
  }
  const Truth truth(d, Request{}, up);
  std::vector<T> de(d.o.N * d.o.D, cce_test::rounded<T>(NAN));
  std::vector<T> dc(d.o.V * d.o.D, cce_test::rounded<T>(NAN));
  std::vector<float> dbias(d.o.V, NAN), nll(d.o.N, NAN), lse(d.o.N, NAN);
  float found = NAN;
  cce::Fused f{};
  f.head = d.head();
  f.nll_coef = up.nll.data();
  f.lse2_coef = z.data();
  f.loss = &found;
  f.nll = nll.data();
  f.lse = lse.data();
  if (gradients) f.out = {de.data(), dc.data(), dbias.data()};
  cce_test::run(f, {.strip_bytes = strip_bytes});
  close("loss", std::fabs(found - loss) / (1e-30 + std::fabs(loss)), 1e-5);
  if (!gradients) return;
  close("dE", error(de, truth.de), tolerance);
  close("dC", error(dc, truth.dc), tolerance);
  close("dbias", error(dbias, truth.dbias), tolerance);
}

Options peaked() {
  Options o;
  o.spread = 12;
  o.softcap = 80;
  o.order = o.missing = true;
  return o;
}

}  // namespace

CASE(cce_backward_bf16) { gradients_match<simt::bf16>(peaked(), {0x1p-2}); }
CASE(cce_backward_bf16_in_chunks_with_profile_and_entropy) {
  Request q{0x1p-2};
  q.entropy = q.profile = true;
  q.strip_bytes = 1;  // a tile at a time
  gradients_match<simt::bf16>(peaked(), q);
}
CASE(cce_backward_bf16_exact_with_everything) {
  Options o = peaked();
  o.class_weight = true;
  Request q;
  q.entropy = q.class_sum = true;
  q.strip_bytes = 2 * 150 * 256 * 2;  // two tiles at a time
  gradients_match<simt::bf16>(o, q);
}
// At most an eighth of the strips: dE strip by strip, in one chunk and in three.
Options sparse() {
  Options o = peaked();
  o.spread = 60;
  o.softcap = 400;
  o.N = 70;
  o.V = 6000;
  o.D = 24;
  return o;
}
CASE(cce_backward_sparse_bf16) {
  simt::host::options.multiprocessors = 2;  // blocks take turns
  Request q{0x1p-2};
  q.most_kept = 0.125;
  gradients_match<simt::bf16>(sparse(), q);
}
CASE(cce_backward_sparse_in_chunks) {
  Options o = sparse();
  o.N = 40;
  o.V = 4500;
  o.D = 264;  // two slices
  o.ignored = 0;
  Request q{0x1p-3};
  q.most_kept = 0.125;
  q.sparse_chunks = true;
  gradients_match<simt::bf16>(o, q);
}
CASE(cce_backward_f16) {
  Request q{0x1p-2};
  q.tolerance = 2e-3;
  gradients_match<simt::f16>(peaked(), q);
}
CASE(cce_backward_float) {
  Options o = peaked();
  o.D = 140;  // two blocks of columns
  o.N = 40;
  Request q{0x1p-2};
  q.profile = true;
  q.tolerance = 1e-4;
  gradients_match<float>(o, q);
}
CASE(cce_backward_float_without_cap) {
  Options o;
  o.softcap = 0;
  o.N = 33;
  o.V = 256;
  o.ignored = 0;
  Request q;
  q.tolerance = 1e-4;
  gradients_match<float>(o, q);
}
CASE(cce_backward_of_one) {
  Options o;
  o.N = 40;
  o.V = 300;
  for (int one = 0; one < 3; ++one) {
    Request q;
    q.need_e = one == 0;
    q.need_c = one == 1;
    q.need_bias = one == 2;
    gradients_match<simt::bf16>(o, q);
  }
}
CASE(cce_backward_of_nothing) {
  Options o;
  o.N = 20;
  o.V = 300;
  o.ignored = 1;
  gradients_match<simt::bf16>(o, {});
}
CASE(cce_fused_bf16) {
  Options o;
  o.order = true;
  fused_matches<simt::bf16>(o, true, 1e-2);
}
CASE(cce_fused_wgmma) {
  Options o;
  o.N = 300;
  o.D = 264;  // two slices of dE and dC, the second almost empty
  fused_matches<simt::bf16>(o, true, 1e-2);
  o.softcap = 0;
  o.N = 3;
  o.V = 256;
  fused_matches<simt::f16>(o, true, 2e-3);
  o.ignored = 1;
  fused_matches<simt::f16>(o, true, 0);
}
// Whether to filter is known on the device only: both families are launched.
CASE(cce_backward_wgmma) {
  Options o;
  o.N = 150;
  o.D = 72;
  o.class_weight = true;
  Request q;
  q.entropy = true;
  q.strip_bytes = 1;
  q.with_summary = true;
  gradients_match<simt::bf16>(o, q);
  q.class_sum = true;
  q.with_summary = false;
  gradients_match<simt::bf16>(o, q);
  o = peaked();
  o.order = false;
  gradients_match<simt::bf16>(o, {0x1p-2});
}
// All strips fit: the forward leaves them.
CASE(cce_fused_in_three_products) {
  Options o;
  o.N = 300;
  o.D = 72;
  o.spread = 20;
  fused_matches<simt::bf16>(o, true, 1e-2, 1 << 20);
  o.softcap = 0;
  o.N = 130;
  fused_matches<simt::f16>(o, true, 2e-3, 1 << 20);
  o.ignored = 1;
  fused_matches<simt::f16>(o, true, 0, 1 << 20);
}
CASE(cce_fused_wgmma_of_a_narrow_cap) {
  Options o;
  o.N = 3;
  o.V = 300;
  o.D = 8;
  o.temperature = 30;
  o.softcap = 0.5;
  fused_matches<simt::bf16>(o, true, 1e-2);
}
CASE(cce_fused_float) {
  Options o;
  o.N = 40;
  o.V = 300;
  fused_matches<float>(o, true, 1e-4);
  fused_matches<float>(o, false, 0);
}
