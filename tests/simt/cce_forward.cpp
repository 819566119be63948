// SPDX-License-Identifier: Apache-2.0
#include "cce/cuda/forward.cu"
#include "cce/cuda/plan.cuh"
#include "cce/cuda/rows.cu"

#include "cce_data.h"

namespace {

namespace cce = cce_test::cce;
namespace cuda = cce_test::cuda;
using cce_test::Data;
using cce_test::ForwardRun;
using cce_test::kIgnore;
using cce_test::Lean;
using cce_test::Options;

void near(double x, double y, double tolerance) {
  if (!(std::fabs(x - y) <= tolerance * (1 + std::fabs(y)))) {
    throw std::logic_error(simt::host::text("expected ", y, " got ", x));
  }
}

template <class T>
void forward_matches(const Options& options, double tolerance = 2e-5, const Lean& lean = {}) {
  Data<T> d(options);
  d.remember();
  const double eps = 0x1p-7;
  const ForwardRun<T> run(d, eps, true, true, lean);
  const double rounding = lean.on ? 0x1p-7 : 0;  // twice, to bf16
  int64_t rows = 0;
  double kept = 0, noise = 0, energy = 0;
  for (int64_t n = 0; n < d.o.N; ++n) {
    if (!d.valid(n)) {
      EXPECT(run.nll[n] == 0 && run.lse[n] == 0 && run.lse_low[n] == 0 && run.mean[n] == 0 &&
             run.argmax[n] == -1 && run.log_squares[n] == 0 && run.average[n] == 0);
      if (d.o.class_weight) EXPECT(run.class_sum[n] == 0);
      continue;
    }
    near(run.lse[n], d.lse_of[n], tolerance);
    EXPECT(std::fabs(run.lse_low[n]) <= 0x1p-23 * std::fabs(run.lse[n]));
    if (d.has_label(n) || d.o.missing) {
      near(run.nll[n], d.lse_of[n] - (d.has_label(n) ? d.s[n][d.targets[n]] : 0.0), tolerance);
    } else {
      EXPECT(std::isnan(run.nll[n]));
    }
    near(run.mean[n], d.mean(n), 5 * tolerance);
    double squares = 0, sum_of_all = 0;
    for (const double x : d.s[n]) {
      squares += std::exp(2 * (x - d.lse_of[n]));
      sum_of_all += x;
    }
    near(run.log_squares[n], std::log(squares), 5 * tolerance);
    near(run.average[n], sum_of_all / double(d.o.V), 5 * tolerance);
    const double top = *std::max_element(d.s[n].begin(), d.s[n].end());
    near(d.s[n].at(run.argmax[n]), top, tolerance);
    if (d.o.class_weight) {
      double sum = 0;
      for (int64_t v = 0; v < d.o.V; ++v) sum += d.class_weight[v] * d.s[n][v];
      near(run.class_sum[n], sum, 100 * tolerance);
    }
    for (int64_t tile = 0; tile < d.tiles(); ++tile) {
      double largest = -INFINITY, mass = 0, square = 0;
      bool label = false;
      for (int64_t i = tile * 256; i < std::min(d.o.V, (tile + 1) * 256); ++i) {
        const double x = d.s[n][i];
        label |= d.targets[n] == i;
        if (d.targets[n] == i) continue;
        largest = std::max(largest, x);
        mass += std::exp(x - d.lse_of[n]) * d.slope(x) * d.o.temperature;
        square += std::exp(2 * (x - d.lse_of[n]));
      }
      const int64_t at = tile * d.o.N + rows, plane = d.tiles() * d.o.N;
      near(run.masses[at], mass, 4 * tolerance + rounding * mass);
      const double distance = mass > 0 ? std::max(1.0, std::fabs(largest - d.mean(n))) : 1;
      near(run.masses[plane + at], mass * distance,
           20 * tolerance + 2 * rounding * mass * distance);
      const double miss = d.has_label(n) ? 1 - std::exp(d.s[n][d.targets[n]] - d.lse_of[n]) : 0;
      kept += label ? 1 : std::min(1.0, mass / eps);
      noise += label ? 0 : square / mass * std::max(eps - mass, 0.0);
      energy += label ? miss * miss : square;
    }
    ++rows;
  }
  for (int64_t plane = 0; plane < 2 * d.tiles(); ++plane) {
    for (int64_t r = rows; r < d.o.N; ++r) EXPECT(run.masses[plane * d.o.N + r] == 0);
  }
  near(run.summary[0], rows == 0 ? 1 : kept / double(rows * d.tiles()), 1e-4 + rounding);
  near(run.summary[1], energy > 0 ? std::sqrt(noise / energy) : 0, 1e-3 + rounding);
  EXPECT(run.summary[2] == (d.o.N > 0 ? eps : 0));  // no memory for masses: nothing to look at
}

}  // namespace

CASE(cce_forward_bf16) {
  Options o;
  o.class_weight = o.missing = true;
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
CASE(cce_forward_lean) {
  Options o;
  o.class_weight = o.missing = true;
  o.N = 140;
  o.V = 1300;
  for (const int64_t plane_bytes : {1, 140 * 7 * 4 * 2, 1 << 24}) {  // one tile, two, all
    forward_matches<simt::bf16>(o, 2e-5, {true, plane_bytes});
  }
  simt::host::options.hopper = false;
  forward_matches<simt::f16>(o, 2e-5, {true});
  o.D = 36;
  o.N = 40;
  forward_matches<float>(o, 5e-5, {true});
  o.D = 40;
  o.softcap = 0;
  o.spread = 60;
  o.V = 513;
  forward_matches<simt::f16>(o, 2e-5, {true});
}
// What tells a row's tiles together loses nothing: a NaN of any of them, sums below the last bit of others.
CASE(cce_forward_lean_equals) {
  Options o;
  o.spread = 20;
  o.N = 70;
  o.V = 1100;
  for (const bool hopper : {true, false}) {
    simt::host::options.hopper = hopper;
    Data<simt::bf16> d(o);
    d.e[3 * o.D + 7] = simt::from_float<simt::bf16>(NAN);
    d.c[600 * o.D + 7] = simt::from_float<simt::bf16>(0);
    const ForwardRun<simt::bf16> all(d, 0, false, true), parts(d, 0, false, true, {true});
    for (int64_t n = 0; n < o.N; ++n) {
      EXPECT(std::isnan(parts.lse[n]) == (n == 3));
      if (n == 3) continue;
      near(parts.lse[n], all.lse[n], 0x1p-23);
      near(parts.nll[n], all.nll[n], 0x1p-23);
      near(parts.mean[n], all.mean[n], 0x1p-22);
      near(parts.log_squares[n], all.log_squares[n], 0x1p-22);
      near(parts.average[n], all.average[n], 0x1p-22);
      EXPECT(parts.argmax[n] == all.argmax[n]);
    }
  }
}
CASE(cce_forward_float) {
  Options o;
  o.D = 36;
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
// Rivals in the label's own tile, far below the last bit of 1: the loss is their sum.
CASE(cce_forward_of_rivals_beside_the_label) {
  Options o;
  o.V = 200;
  o.D = 16;
  o.ignored = 0;
  o.softcap = 0;
  o.temperature = o.scale = 1;
  o.bias = false;
  for (const bool hopper : {true, false}) {
    for (const double lead : {20.0, 40.0}) {
      simt::host::options.hopper = hopper;
      Data<simt::bf16> d(o);
      std::vector<float> bias(o.V, static_cast<float>(-lead));
      bias[7] = 0;
      d.o.bias = true;
      d.bias = bias;
      for (int64_t n = 0; n < o.N; ++n) {
        d.targets[n] = 7;
        for (int64_t v = 0; v < o.V; ++v) d.s[n][v] += bias[v] - d.s[n][7] * (v == 7);
        for (int64_t k = 0; k < o.D; ++k) d.c[7 * o.D + k] = simt::from_float<simt::bf16>(0);
      }
      const ForwardRun<simt::bf16> run(d, 0, false, true);
      for (int64_t n = 0; n < o.N; ++n) {
        double rivals = 0;
        for (int64_t v = 0; v < o.V; ++v) rivals += v == 7 ? 0 : std::exp(d.s[n][v]);
        EXPECT(std::fabs(run.nll[n] / std::log1p(rivals) - 1) < 2e-5);
      }
    }
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
// Of the seven tau the largest that is accurate, or none.
CASE(cce_forward_auto) {
  Options o;
  o.softcap = 0;
  o.spread = 40;
  o.N = 40;
  o.V = 16384;
  const ForwardRun<simt::bf16> sharp(Data<simt::bf16>(o), cce::kAutoEps);
  EXPECT(sharp.summary[2] > 0 && sharp.summary[0] < cuda::kListedShare);
  EXPECT(sharp.summary[1] > 0 && sharp.summary[1] <= cce::kAutoError);
  o.spread = 0.1;
  o.V = 1024;  // a tau of 2^-6 would keep all of the few strips
  const ForwardRun<simt::bf16> flat(Data<simt::bf16>(o), cce::kAutoEps);
  EXPECT(flat.summary[2] == 0 && flat.summary[1] == 0 && flat.summary[0] == 1);
}
CASE(cce_philox) {
  EXPECT(cce::philox(0, 0, 0) == 0xff1dae59);
  EXPECT(cce::philox(0xffffffff, 0xffffffff, 0xffffffff) == 0x2c3f628b);
  EXPECT(cce::philox(0x243f6a88, 0x85a308d3, 0x13198a2e) == 0xdd7ce038);
}
CASE(cce_choose_tau) {
  double kept[cce::kCandidates], noise[cce::kCandidates];
  for (int i = 0; i < cce::kCandidates; ++i) {
    kept[i] = 10 * (i + 1);
    noise[i] = std::ldexp(1.0, -10 - i);
  }
  // sqrt(2^-12 / 1) is the bound: the third
  const auto chosen = [&](double eps, double break_even) {
    return cce::choose_tau(eps, break_even, 100, kept, noise, 1.0);
  };
  EXPECT(chosen(cce::kAutoEps, 0.6).tau == 0x1p-8 && chosen(cce::kAutoEps, 0.6).kept == 0.3);
  EXPECT(chosen(cce::kAutoEps, 0.2).tau == 0 && chosen(cce::kAutoEps, 0.2).kept == 1);
  EXPECT(chosen(0.5, 0.01).tau == 0.5 && chosen(0.5, 0.01).error == 0x1p-5);
  noise[6] = noise[5] = noise[4] = noise[3] = noise[2] = 1;
  EXPECT(chosen(cce::kAutoEps, 0.6).tau == 0);
}
// Every chunk of strips fits the memory there is, whatever is kept.
CASE(cce_capacity) {
  for (const int64_t N : {1, 100, 8192}) {
    for (const int64_t tiles : {1, 7, 1000}) {
      for (const int64_t bytes : {int64_t{1}, int64_t{1} << 20, int64_t{256} << 20}) {
        const cuda::Capacity c(N, tiles, bytes, 512, 512, true);
        EXPECT(c.dense_tiles * c.dense_chunks >= tiles && c.dense_tiles >= 1);
        EXPECT(c.dense_tiles == 1 || c.dense_tiles * N * 512 <= bytes);
        EXPECT(c.sparse * (512 + 512) <= bytes || c.sparse == 0);
        if (c.sparse == 0) continue;
        EXPECT(c.stride + N <= c.sparse || c.sparse == N * tiles);
        EXPECT(c.fits(static_cast<int64_t>(cuda::kListedShare * double(N * tiles))));
      }
    }
  }
  const cuda::Capacity usual(8192, 1000, int64_t{256} << 20, 512, 512, true);
  EXPECT(usual.sparse_chunks == 9);
}
