// SPDX-License-Identifier: Apache-2.0
#include <array>

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
  bool entropy = false, class_sum = false, scale = false;
  int64_t seed = 5;
  bool need_e = true, need_c = true, need_bias = true;
  int64_t strip_bytes = 64 << 20;
  double tolerance = 1e-2;  // two roundings to bf16
  double most_kept = 1;
  bool with_summary = false;  // of a forward that kept everything
  bool lean = false;
  bool sparse_chunks = false;  // as little memory as the sparse form needs, less than for one chunk
};

// [N] each: d_nll, d_lse, d_mean, d_class, of very different sizes; one row has none. The scales are those
// of a larger vocabulary.
struct Upstreams {
  std::vector<float> nll, lse, mean, classes, scale;
  explicit Upstreams(int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const float size = i % 4 == 1 ? 0.0f : std::ldexp(1e-3f, int(i % 5));
      nll.push_back(size * float(1 + i % 3));
      lse.push_back(size * 0.3f);
      mean.push_back(size * 0.5f);
      classes.push_back(size * 0.1f);
      scale.push_back(size * 4.0f);
    }
  }
};

// Gradients in float64, of the strips that the masses of a forward draw; all without one.
struct Truth {
  std::vector<double> de, dc, dbias;
  int64_t dropped = 0, kept = 0, drawn = 0;

  template <class T>
  Truth(const Data<T>& d, const Request& q, const Upstreams& up,
        const ForwardRun<T>* rows = nullptr)
      : de(d.o.N * d.o.D), dc(d.o.V * d.o.D), dbias(d.o.V) {
    double mean_scale = 0, valid = 0;
    const auto coefficient = [&](const std::vector<float>& x, bool wanted, int64_t n) {
      return wanted ? x[n] : 0.0f;
    };
    const auto a_of = [&](int64_t n) {
      return up.nll[n] + up.lse[n] + coefficient(up.mean, q.entropy, n);
    };
    const auto scale_of = [&](int64_t n) {
      const float b = up.nll[n], dm = coefficient(up.mean, q.entropy, n);
      const float dk = coefficient(up.classes, q.class_sum, n);
      if (q.scale) return up.scale[n];
      return std::max(
          {std::fabs(a_of(n)), d.has_label(n) ? std::fabs(b) : 0.0f, std::fabs(dm), std::fabs(dk)});
    };
    for (int64_t n = 0; n < d.o.N; ++n) {
      if (d.valid(n) && scale_of(n) != 0) mean_scale += scale_of(n), valid += 1;
    }
    mean_scale /= std::max(valid, 1.0);
    int64_t at = -1;
    for (int64_t n = 0; n < d.o.N; ++n) {
      if (!d.valid(n)) continue;
      ++at;
      const float a = a_of(n), q_n = coefficient(up.mean, q.entropy, n);
      const double mean = q.entropy ? d.mean(n) : 0;
      const double dk = coefficient(up.classes, q.class_sum, n);
      const double b = d.has_label(n) ? up.nll[n] : 0;
      if (scale_of(n) == 0) continue;
      const float threshold =
          static_cast<float>(q.eps) * std::min(scale_of(n), static_cast<float>(mean_scale));
      uint32_t phase =
          rows ? cce::first_phase(static_cast<uint32_t>(n), simt::bits_of(rows->lse[n]), q.seed)
               : 0;
      for (int64_t tile = 0; tile < d.tiles(); ++tile) {
        const int64_t first = tile * kTile, last = std::min(d.o.V, first + kTile);
        const bool label = d.has_label(n) && d.targets[n] / kTile == tile;
        double weight = 1;
        if (rows && !label) {
          const int64_t strip = tile * d.o.N + at;
          float x = std::fabs(a) * rows->masses[strip];
          if (q.entropy) x = fmaf(std::fabs(q_n), rows->masses[d.tiles() * d.o.N + strip], x);
          const float u = x / threshold;
          if (u < 1) {
            const auto step = static_cast<uint32_t>(std::max(u * 0x1p32f, u > 0 ? 1.0f : 0.0f));
            const uint64_t sum = uint64_t{phase} + step;
            phase = static_cast<uint32_t>(sum);
            weight = sum >> 32 ? 0x1p32 / step : 0;
            drawn += weight > 0;
          }
        }
        (weight > 0 ? kept : dropped) += 1;
        for (int64_t v = first; v < last; ++v) {
          const double x = d.s[n][v], p = std::exp(x - d.lse_of[n]);
          double g = weight * p * (a + double(q_n) * (x - mean));
          if (q.class_sum) g += dk * d.class_weight[v];
          if (d.targets[n] == v) g -= b;
          g *= d.slope(x);
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
  const ForwardRun<T> rows(d, q.eps, true, true, {q.lean});
  const Truth truth(d, q, up, q.eps > 0 ? &rows : nullptr);
  std::vector<T> de(d.o.N * d.o.D, cce_test::rounded<T>(NAN));
  std::vector<T> dc(d.o.V * d.o.D, cce_test::rounded<T>(NAN));
  std::vector<float> dbias(d.o.V, NAN);
  cce::Backward b{};
  b.head = d.head();
  b.up = {rows.nll.data(),
          rows.lse.data(),
          rows.lse_low.data(),
          rows.mean.data(),
          up.nll.data(),
          up.lse.data(),
          q.entropy ? up.mean.data() : nullptr,
          q.class_sum ? up.classes.data() : nullptr,
          q.scale ? up.scale.data() : nullptr};
  b.lean = q.lean;
  b.masses = q.lean ? static_cast<const void*>(rows.lean_masses.data()) : rows.masses.data();
  b.summary = q.eps > 0 || q.with_summary ? rows.summary.data() : nullptr;
  b.seed = q.seed;
  b.out = {q.need_e ? de.data() : nullptr, q.need_c ? dc.data() : nullptr,
           q.need_bias ? dbias.data() : nullptr};
  cuda::Memory memory{.strip_bytes = q.strip_bytes};
  if (q.sparse_chunks) {
    const int64_t capacity = 2 * d.o.N + truth.kept / 4;
    EXPECT(cuda::Capacity(d.o.N, d.tiles(), capacity * 512 * sizeof(T), 256 * sizeof(T),
                          256 * sizeof(T), true)
               .stride < truth.kept);
    memory.strip_bytes = capacity * 512 * sizeof(T);
  }
  cce_test::run(b, memory);
  if (q.eps > 0) EXPECT(truth.dropped > 0 && truth.drawn > 0);
  EXPECT(truth.kept <= q.most_kept * (truth.kept + truth.dropped));
  if (q.need_e) close("dE", error(de, truth.de), q.tolerance);
  if (q.need_c) close("dC", error(dc, truth.dc), q.tolerance);
  if (q.need_bias) close("dbias", error(dbias, truth.dbias), q.tolerance);
}

template <class T>
void fused_matches(const Options& options, bool gradients, double tolerance,
                   int64_t strip_bytes = 1, bool lean = false) {
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
  f.lean = lean;
  cce_test::run(f, {.strip_bytes = strip_bytes, .plane_bytes = 1});
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
  o.missing = true;
  return o;
}

}  // namespace

// By lists of every row, without Hopper: there the dense kernels would take what keeps so much.
CASE(cce_backward_bf16) {
  simt::host::options.hopper = false;
  gradients_match<simt::bf16>(peaked(), {0x1p-2});
}
CASE(cce_backward_bf16_in_chunks_with_entropy) {
  simt::host::options.hopper = false;
  Request q{0x1p-2};
  q.entropy = q.scale = true;
  q.strip_bytes = 1;  // a tile at a time
  gradients_match<simt::bf16>(peaked(), q);
}
CASE(cce_backward_bf16_exact_with_everything) {
  simt::host::options.hopper = false;
  Options o = peaked();
  o.class_weight = true;
  Request q;
  q.entropy = q.class_sum = true;
  q.strip_bytes = 2 * 150 * 256 * 2;  // two tiles at a time
  gradients_match<simt::bf16>(o, q);
}
// Few strips: dE strip by strip, in one chunk and in several.
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
  q.most_kept = cuda::kListedShare;
  gradients_match<simt::bf16>(sparse(), q);
  q.entropy = q.scale = true;
  gradients_match<simt::bf16>(sparse(), q);
}
CASE(cce_backward_sparse_in_chunks) {
  Options o = sparse();
  o.N = 40;
  o.V = 4500;
  o.D = 264;  // two slices
  o.ignored = 0;
  Request q{0x1p-3};
  q.most_kept = cuda::kListedShare;
  q.sparse_chunks = true;
  gradients_match<simt::bf16>(o, q);
}
CASE(cce_backward_f16) {
  simt::host::options.hopper = false;
  Request q{0x1p-2};
  q.tolerance = 2e-3;
  gradients_match<simt::f16>(peaked(), q);
}
CASE(cce_backward_float) {
  Options o = peaked();
  o.D = 140;  // two blocks of columns
  o.N = 40;
  Request q{0x1p-2};
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
  simt::host::options.hopper = false;
  Options o;
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
// In the last tile there is no column but the label of the first row.
CASE(cce_fused_of_a_lone_label) {
  Options o;
  o.N = 3;
  o.V = 257;
  o.D = 8;
  o.ignored = 0;
  o.temperature = 30;
  o.softcap = 0.5;  // whose square outside of the vocabulary float16 cannot hold
  for (const int64_t strip_bytes : {1, 1 << 20}) {
    fused_matches<simt::f16>(o, true, 2e-3, strip_bytes);
  }
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
CASE(cce_scale) {
  std::vector<simt::bf16> x(1000, simt::from_float<simt::bf16>(3));
  for (const float factor : {1.0f, 0.5f}) {
    cce_test::run(cce::Scale{x.data(), gemma_ext::DType::kBFloat16, 1000, &factor}, {});
    for (const simt::bf16 value : x) EXPECT(simt::to_float(value) == 3 * factor);
  }
}
CASE(cce_backward_lean) {
  Request q{0x1p-2};
  q.most_kept = cuda::kListedShare;
  q.lean = true;
  gradients_match<simt::bf16>(sparse(), q);
  q.entropy = q.scale = true;
  gradients_match<simt::bf16>(sparse(), q);
  q = {0x1p-3};
  q.lean = q.sparse_chunks = true;
  Options o = sparse();
  o.N = 40;
  o.V = 4500;
  o.D = 264;
  o.ignored = 0;
  gradients_match<simt::bf16>(o, q);
}
CASE(cce_backward_lean_before_hopper) {
  simt::host::options.hopper = false;
  Request q{0x1p-2};
  q.lean = true;
  q.strip_bytes = 1;
  gradients_match<simt::bf16>(peaked(), q);
  q.tolerance = 2e-3;
  gradients_match<simt::f16>(peaked(), q);
}
CASE(cce_backward_lean_float) {
  Options o = peaked();
  o.D = 140;
  o.N = 40;
  Request q{0x1p-2};
  q.lean = true;
  q.tolerance = 1e-4;
  gradients_match<float>(o, q);
}
// More is kept than lists are for: dense, with the strips in dC while there is room.
CASE(cce_backward_lean_wgmma) {
  Options o;
  o.N = 150;
  o.V = 2000;
  o.D = 264;
  Request q;
  q.lean = q.with_summary = true;
  q.strip_bytes = 1;
  gradients_match<simt::bf16>(o, q);
  q.need_c = false;
  gradients_match<simt::bf16>(o, q);
  q.need_c = true;
  q.need_e = false;
  q.tolerance = 2e-3;
  gradients_match<simt::f16>(o, q);
}
CASE(cce_fused_lean) {
  Options o;
  o.N = 300;
  o.D = 264;
  o.V = 1500;
  fused_matches<simt::bf16>(o, true, 1e-2, 1, true);
  fused_matches<simt::bf16>(o, false, 0, 1, true);
  o.V = 300;
  fused_matches<simt::bf16>(o, true, 1e-2, 1 << 20, true);  // all strips fit
  o.N = 40;
  fused_matches<float>(o, true, 1e-4, 1, true);
}
namespace {

// Gradients of a forward, exact, in the workspace alone.
template <class T>
std::vector<float> exact_gradients(const Data<T>& d, const ForwardRun<T>& rows, bool lean) {
  const Upstreams up(d.o.N);
  std::vector<T> de(d.o.N * d.o.D);
  std::vector<float> all;
  cce::Backward b{};
  b.head = d.head();
  b.up = {rows.nll.data(), rows.lse.data(), rows.lse_low.data(),
          nullptr,         up.nll.data(),   up.lse.data(),
          nullptr,         nullptr,         nullptr};
  b.out.de = de.data();
  b.lean = lean;
  cce_test::run(b, {.strip_bytes = 1});
  for (const T x : de) all.push_back(static_cast<float>(cce_test::value_of(x)));
  return all;
}

}  // namespace
// Sums in two halves are the same sums.
CASE(cce_backward_lean_has_the_same_bits) {
  for (const bool hopper : {true, false}) {
    simt::host::options.hopper = hopper;
    Options o;
    o.V = 1300;
    o.D = 264;
    const Data<simt::bf16> d(o);
    const ForwardRun<simt::bf16> rows(d, 0, false);
    EXPECT(exact_gradients(d, rows, true) == exact_gradients(d, rows, false));
  }
  const Data<float> d(Options{});
  const ForwardRun<float> rows(d, 0, false);
  EXPECT(exact_gradients(d, rows, true) == exact_gradients(d, rows, false));
}
namespace {

cce::Head large_head(int64_t N) {
  cce::Head h{};
  h.dtype = gemma_ext::DType::kBFloat16;
  h.N = N;
  h.V = 256000;
  h.D = 2304;
  return h;
}

// Bytes of a step: {sampled, exact}.
std::array<int64_t, 2> step_bytes(int64_t N, bool lean) {
  static char there;  // never written
  float* const vector = reinterpret_cast<float*>(&there);
  const cuda::Memory memory{.strip_bytes = lean ? cuda::kLeanStripBytes : cuda::kStripBytes};
  cce::Forward f{};
  f.head = large_head(N);
  f.masses = vector;
  f.lean = lean;
  cce::Backward b{};
  b.head = f.head;
  b.masses = vector;
  b.summary = reinterpret_cast<double*>(&there);
  b.out = {vector, vector, nullptr};
  b.lean = lean;
  cce::Fused fused{};
  fused.head = f.head;
  fused.out = b.out;
  fused.lean = lean;
  return {cuda::step_bytes(f, b, memory), cuda::step_bytes(fused, memory)};
}

}  // namespace
// At N 8192, D 2304, V 256000 in bfloat16.
CASE(cce_lean_memory) {
  const auto usual = step_bytes(8192, false), lean = step_bytes(8192, true);
  EXPECT(lean[0] <= 120'000'000 && lean[1] <= 120'000'000);
  EXPECT(usual[0] > 3 * lean[0] && usual[1] > 3 * lean[1]);
  for (const int64_t N : {1, 512, 2048, 32768}) {
    EXPECT(step_bytes(N, true)[0] <= step_bytes(N, false)[0]);
    EXPECT(step_bytes(N, true)[1] <= step_bytes(N, false)[1]);
  }
}
// Strips in dC lie behind all of it that their chunk writes, and every tile has its turn.
CASE(cce_dense_chunks) {
  cce::Head h = large_head(0);
  for (const int64_t N : {1, 300, 8192, 40000}) {
    for (const int64_t V : {int64_t{1}, int64_t{257}, int64_t{70000}, int64_t{256000}}) {
      for (const bool in_dc : {false, true}) {
        h.N = N;
        h.V = V;
        const cuda::DenseChunks chunks(h, cuda::kLeanStripBytes, in_dc);
        int first = 0, launches = 0;
        while (first < chunks.tiles) {
          const auto chunk = chunks.from(first);
          EXPECT(chunk.tiles >= 1 && first + chunk.tiles <= chunks.tiles);
          const int64_t strips = chunk.tiles * chunks.tile_bytes;
          if (chunk.in_dc) {
            EXPECT(in_dc && chunk.in_dc % 256 == 0 && strips <= cuda::kStripBytes);
            EXPECT(chunk.in_dc >= (first + chunk.tiles) * chunks.dc_tile_bytes);
            EXPECT(chunk.in_dc + strips <= V * h.D * 2);
          } else {
            EXPECT(chunk.tiles <= chunks.in_workspace);
          }
          first += chunk.tiles;
          ++launches;
        }
        EXPECT(first == chunks.tiles && launches <= chunks.tiles);
      }
    }
  }
}
