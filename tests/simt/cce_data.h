// SPDX-License-Identifier: Apache-2.0
// Small heads with known answers in float64, for the cut cross-entropy kernels of the device.
#pragma once

#include <cmath>
#include <limits>
#include <random>

#include "cce/cuda/engine.h"
#include "check.h"

namespace cce_test {

namespace cce = gemma_ext::cce;
namespace cuda = cce::cuda;
using gemma_ext::DType;
using gemma_ext::cce::kTile;

constexpr int64_t kIgnore = -100;

template <class T>
double value_of(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return simt::to_float(x);
  }
}
template <class T>
T rounded(double x) {
  if constexpr (std::is_same_v<T, float>) {
    return static_cast<float>(x);
  } else {
    return simt::from_float<T>(static_cast<float>(x));
  }
}
template <class T>
constexpr DType kType = std::is_same_v<T, float>        ? DType::kFloat32
                        : std::is_same_v<T, simt::bf16> ? DType::kBFloat16
                                                        : DType::kFloat16;

// ||x - y|| / ||y||; NaN anywhere is infinite.
template <class X>
double error(const std::vector<X>& x, const std::vector<double>& y) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    const double d = value_of(x[i]) - y[i];
    if (std::isnan(d)) return std::numeric_limits<double>::infinity();
    difference += d * d;
    size += y[i] * y[i];
  }
  return difference == 0 ? 0 : std::sqrt(difference / size);
}

struct Options {
  int64_t N = 150, V = 600, D = 40;
  double softcap = 5, temperature = 1.25, scale = 0.75;  // of the logits
  double spread = 3;                                     // of the logits before the cap
  bool bias = true, class_weight = false, missing = false;
  int ignored = 5;  // every fifth row; 1: all, 0: none
};

// Ignored rows of e hold NaN: nothing may come of them.
template <class T>
struct Data {
  Options o;
  std::vector<T> e, c;
  std::vector<int64_t> targets;
  std::vector<float> bias, class_weight;
  std::vector<std::vector<double>> s;  // [N][V] logits, empty in ignored rows

  explicit Data(const Options& options, int seed = 1) : o(options) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const auto fill = [&](auto& to, int64_t n, double size) {
      using X = std::decay_t<decltype(to[0])>;
      to.resize(n);
      for (auto& x : to) x = rounded<X>(size * normal(random));
    };
    fill(e, o.N * o.D, o.spread / std::sqrt(double(o.D)));
    fill(c, o.V * o.D, 1.0);
    if (o.bias) fill(bias, o.V, 0.5);
    if (o.class_weight) fill(class_weight, o.V, 1.0);
    for (int64_t n = 0; n < o.N; ++n) {
      int64_t label = random() % o.V;
      if (n == 0) label = o.V - 1;
      if (o.missing && n % 7 == 3) label = o.V + 3;
      if (o.ignored && n % o.ignored == 0) label = kIgnore;
      targets.push_back(label);
      if (label != kIgnore) continue;
      for (int64_t d = 0; d < o.D; ++d) e[n * o.D + d] = rounded<T>(NAN);
    }
    s.resize(o.N);
    for (int64_t n = 0; n < o.N; ++n) {
      if (targets[n] == kIgnore) continue;
      for (int64_t v = 0; v < o.V; ++v) {
        double a = 0;
        for (int64_t d = 0; d < o.D; ++d) a += value_of(e[n * o.D + d]) * value_of(c[v * o.D + d]);
        a = a * o.scale + (o.bias ? bias[v] : 0.0);
        s[n].push_back((o.softcap > 0 ? o.softcap * std::tanh(a / o.softcap) : a) / o.temperature);
      }
    }
  }

  bool valid(int64_t n) const { return targets[n] != kIgnore; }
  bool has_label(int64_t n) const { return targets[n] >= 0 && targets[n] < o.V; }
  int64_t tiles() const { return cce::tiles_of(o.V); }
  double slope(double x) const {
    const double t = o.softcap > 0 ? x * o.temperature / o.softcap : 0;
    return (1 - t * t) / o.temperature;
  }
  double lse(int64_t n) const {
    double top = -INFINITY, sum = 0;
    for (double x : s[n]) top = std::max(top, x);
    for (double x : s[n]) sum += std::exp(x - top);
    return top + std::log(sum);
  }
  double mean(int64_t n) const {
    double sum = 0;
    for (double x : s[n]) sum += std::exp(x - lse_of[n]) * x;
    return sum;
  }
  std::vector<double> lse_of;  // filled by remember()
  void remember() {
    for (int64_t n = 0; n < o.N; ++n) lse_of.push_back(valid(n) ? lse(n) : 0);
  }

  cce::Head head() const {
    cce::Head h{};
    h.e = e.data();
    h.c = c.data();
    h.e_stride = h.c_stride = static_cast<int>(o.D);
    h.e_step = h.c_step = 1;
    h.dtype = kType<T>;
    h.targets = targets.data();
    h.target_stride = 1;
    h.wide_targets = true;
    h.bias = o.bias ? bias.data() : nullptr;
    h.class_weight = o.class_weight ? class_weight.data() : nullptr;
    h.N = o.N;
    h.V = o.V;
    h.D = o.D;
    h.map = cce::logit_map(o.softcap, o.scale, o.temperature);
    h.ignore_index = kIgnore;
    h.allow_missing = o.missing;
    return h;
  }
};

// Exactly as long as the kernels ask for, and nonsense before they run.
struct Workspace {
  std::vector<uint8_t> bytes;
  explicit Workspace(int64_t n) : bytes(n, 0xff) {}
  void* data() { return bytes.data(); }
};

template <class Call>
void run(const Call& call, cuda::Memory memory) {
  Workspace workspace(cuda::workspace(call, memory));
  memory.workspace = workspace.data();
  EXPECT(cuda::run(call, memory, nullptr) == cuda::Status{});
}

// Little memory, and how much of it there is for the sums of strips: a tile at a time.
struct Lean {
  bool on = false;
  int64_t plane_bytes = 1;
};

// The results of a forward, poisoned before it.
template <class T>
struct ForwardRun {
  std::vector<float> nll, lse, lse_low, mean, class_sum, masses, log_squares, average;
  std::vector<simt::bf16> lean_masses;
  std::vector<int64_t> argmax;
  std::vector<double> summary;

  ForwardRun(const Data<T>& d, double eps, bool want_masses = true, bool want_mean = true,
             const Lean& lean = {})
      : nll(d.o.N, NAN),
        lse(d.o.N, NAN),
        lse_low(d.o.N, NAN),
        mean(want_mean ? d.o.N : 0, NAN),
        class_sum(d.o.class_weight ? d.o.N : 0, NAN),
        masses(want_masses ? (1 + want_mean) * d.tiles() * d.o.N : 0, NAN),
        log_squares(want_mean ? d.o.N : 0, NAN),
        average(want_mean ? d.o.N : 0, NAN),
        argmax(d.o.N, -7),
        summary(3, NAN) {
    cce::Forward f{};
    f.head = d.head();
    f.out = {nll.data(),
             lse.data(),
             lse_low.data(),
             want_mean ? mean.data() : nullptr,
             d.o.class_weight ? class_sum.data() : nullptr,
             argmax.data(),
             want_mean ? log_squares.data() : nullptr,
             want_mean ? average.data() : nullptr};
    f.lean = lean.on;
    if (lean.on) lean_masses.resize(masses.size(), rounded<simt::bf16>(NAN));
    f.masses = !want_masses ? nullptr
               : lean.on    ? static_cast<void*>(lean_masses.data())
                            : masses.data();
    f.summary = summary.data();
    f.eps = eps;
    run(f, {.plane_bytes = lean.plane_bytes});
    for (size_t i = 0; i < lean_masses.size(); ++i) masses[i] = simt::to_float(lean_masses[i]);
  }
};

}  // namespace cce_test
