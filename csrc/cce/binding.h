// SPDX-License-Identifier: Apache-2.0
// Cut cross-entropy between tensors and an engine: checks, results, the calls, once for both.
//
// An engine, made per call from (op, e), has
//   here(t)                 whether t lies where it computes
//   matrix(op, name, t)     t [rows, columns] with strides that it takes, a padded copy if need be
//   run(op, like, call)     a call of contract.h
//   kLean                   whether it has a lean form
#pragma once

#include <tuple>

#include "common/torch/tensors.h"
#include "contract.h"

namespace gemma_ext::cce {

using torch::stable::new_empty;

struct HeadTensors {
  const Tensor &e, &c, &targets;
  const std::optional<Tensor>&bias, &class_weight;
  double softcap, logit_scale, temperature;
  int64_t ignore_index;
  bool allow_missing;
};

template <class Engine>
struct Binding {
  // [n] contiguous float32, converted where it is not.
  static Tensor float_values(const char* op, const char* name, const Tensor& t, int64_t n) {
    check_vector(op, name, t, n);
    storage_type(op, name, t);
    return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
  }

  static void check_vector(const char* op, const char* name, const Tensor& t, int64_t n) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, op, ": expected ", name, " to be [", n, "]");
    STD_TORCH_CHECK(Engine::here(t), op, ": expected ", name, " on the device of e");
  }

  static Tensor matrix(const char* op, const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 2, op, ": expected ", name, " to have 2 dimensions, got ", t.dim());
    STD_TORCH_CHECK(Engine::here(t), op, ": expected ", name, " on the device of e");
    storage_type(op, name, t);
    return Engine::matrix(op, name, t);
  }

  // The head and the tensors its pointers lead to.
  struct Prepared {
    Tensor e, c;
    std::optional<Tensor> bias, class_weight;
    Head head{};

    Prepared(const char* op, const HeadTensors& h)
        : e(matrix(op, "e", h.e)), c(matrix(op, "c", h.c)) {
      STD_TORCH_CHECK(h.e.scalar_type() == h.c.scalar_type(), op,
                      ": expected e and c to have one dtype");
      STD_TORCH_CHECK(h.e.size(1) == h.c.size(1), op, ": expected c to be [V, ", h.e.size(1),
                      "], got [", h.c.size(0), ", ", h.c.size(1), "]");
      STD_TORCH_CHECK(h.c.size(0) > 0, op, ": expected c to have at least one row");
      STD_TORCH_CHECK(h.c.size(0) <= INT32_MAX && h.e.size(0) <= INT32_MAX, op,
                      ": expected fewer than 2^31 rows of e and of c");
      head.e = e.data_ptr();
      head.c = c.data_ptr();
      head.e_stride = static_cast<int>(e.stride(0));
      head.c_stride = static_cast<int>(c.stride(0));
      head.e_step = static_cast<int>(e.stride(1));
      head.c_step = static_cast<int>(c.stride(1));
      head.dtype = storage_type(op, "e", e);
      head.N = e.size(0);
      head.V = c.size(0);
      head.D = e.size(1);
      check_vector(op, "targets", h.targets, head.N);
      head.wide_targets = h.targets.scalar_type() == ScalarType::Long;
      STD_TORCH_CHECK(head.wide_targets || h.targets.scalar_type() == ScalarType::Int, op,
                      ": expected targets to be int32 or int64");
      head.targets = h.targets.data_ptr();
      head.target_stride = h.targets.stride(0);
      if (h.bias) {
        bias = float_values(op, "bias", *h.bias, head.V);
        head.bias = floats(*bias);
      }
      if (h.class_weight) {
        class_weight = float_values(op, "class_weight", *h.class_weight, head.V);
        head.class_weight = floats(*class_weight);
      }
      head.map = logit_map(h.softcap, h.logit_scale, h.temperature);
      head.ignore_index = h.ignore_index;
      head.allow_missing = h.allow_missing;
    }
  };

  // Gradient tensors of the wanted inputs; empty ones stand for the others.
  struct GradTensors {
    int64_t width;
    Tensor de, dc, dbias;
    Gradients out{};

    GradTensors(const Prepared& p, int64_t width, bool need_e, bool need_c, bool need_bias)
        : width(width),
          de(new_empty(p.e, {need_e ? p.head.N : 0, need_e ? p.head.D : 0})),
          dc(new_empty(p.c, {need_c ? p.head.V : 0, need_c ? p.head.D : 0})),
          dbias(new_empty(p.e, {need_bias ? p.head.V : 0}, ScalarType::Float)) {
      if (need_e) out.de = de.mutable_data_ptr();
      if (need_c) out.dc = dc.mutable_data_ptr();
      if (need_bias) out.dbias = floats(dbias);
    }

    // Without the columns that only fill a word.
    Tensor without_padding(Tensor& t) const {
      if (t.size(1) <= width) return t;
      return torch::stable::contiguous(torch::stable::narrow(t, 1, 0, width));
    }
    std::tuple<Tensor, Tensor, Tensor> finish() {
      return {without_padding(de), without_padding(dc), dbias};
    }
  };

  static ScalarType type_of_masses(bool lean) {
    return Engine::kLean && lean ? ScalarType::BFloat16 : ScalarType::Float;
  }

  using RowTensors =
      std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static RowTensors forward(const Tensor& e, const Tensor& c, const Tensor& targets,
                            const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& class_weight, double softcap,
                            double logit_scale, double temperature, int64_t ignore_index,
                            bool allow_missing, double filter_eps, bool want_mean, bool want_argmax,
                            bool lean, bool want_moments) {
    const char* op = "cce_forward";
    Engine engine(op, e);
    const Prepared p(op, {e, c, targets, bias, class_weight, softcap, logit_scale, temperature,
                          ignore_index, allow_missing});
    const int64_t rows = p.head.N;
    const bool filtered = filter_eps != 0;
    const auto vector = [&](bool wanted) {
      return new_empty(e, {wanted ? rows : 0}, ScalarType::Float);
    };
    Tensor nll = vector(true), lse = vector(true), lse_low = vector(true), mean = vector(want_mean);
    Tensor class_sum = vector(class_weight.has_value());
    Tensor argmax = new_empty(e, {want_argmax ? rows : 0}, ScalarType::Long);
    Tensor log_squares = vector(want_moments), average = vector(want_moments);
    Tensor summary = new_empty(e, {3}, ScalarType::Double);
    Tensor masses = new_empty(
        e, {filtered ? 1 + want_mean : 0, filtered ? tiles_of(p.head.V) : 0, filtered ? rows : 0},
        type_of_masses(lean));
    Forward call{};
    call.head = p.head;
    call.out = {floats(nll),
                floats(lse),
                floats(lse_low),
                want_mean ? floats(mean) : nullptr,
                class_weight ? floats(class_sum) : nullptr,
                want_argmax ? static_cast<int64_t*>(argmax.mutable_data_ptr()) : nullptr,
                want_moments ? floats(log_squares) : nullptr,
                want_moments ? floats(average) : nullptr};
    call.masses = filtered ? masses.mutable_data_ptr() : nullptr;
    call.summary = static_cast<double*>(summary.mutable_data_ptr());
    call.eps = filter_eps;
    call.lean = Engine::kLean && lean;
    engine.run(op, e, call);
    return {nll, lse, lse_low, mean, class_sum, argmax, masses, summary, log_squares, average};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(
      const Tensor& e, const Tensor& c, const Tensor& targets, const std::optional<Tensor>& bias,
      const std::optional<Tensor>& class_weight, const Tensor& nll, const Tensor& lse,
      const Tensor& lse_low, const Tensor& mean, const Tensor& masses, const Tensor& summary,
      const std::optional<Tensor>& scale, const Tensor& d_nll, const Tensor& d_lse,
      const std::optional<Tensor>& d_mean, const std::optional<Tensor>& d_class, double softcap,
      double logit_scale, double temperature, int64_t ignore_index, bool allow_missing,
      int64_t seed, bool lean, bool need_e, bool need_c, bool need_bias) {
    const char* op = "cce_backward";
    Engine engine(op, e);
    const Prepared p(op, {e, c, targets, bias, class_weight, softcap, logit_scale, temperature,
                          ignore_index, allow_missing});
    const int64_t rows = p.head.N, tiles = tiles_of(p.head.V);
    const bool filtered = masses.numel() > 0;
    STD_TORCH_CHECK(
        !filtered || (masses.dim() == 3 && masses.is_contiguous() && masses.size(1) == tiles &&
                      masses.size(2) == rows && masses.scalar_type() == type_of_masses(lean)),
        op, ": expected masses of the same forward, [planes, ", tiles, ", ", rows, "], or empty");
    STD_TORCH_CHECK(summary.numel() == 3 && summary.scalar_type() == ScalarType::Double, op,
                    ": expected summary to be [3] float64");
    STD_TORCH_CHECK(!d_mean || rows == 0 || (mean.numel() > 0 && (!filtered || masses.size(0) > 1)),
                    op, ": expected a forward with want_mean for d_mean");
    STD_TORCH_CHECK(!d_class || class_weight, op, ": expected class_weight for d_class");

    std::vector<Tensor> kept;
    const auto values = [&](const char* name, const Tensor& t, int64_t n) {
      kept.push_back(float_values(op, name, t, n));
      return floats(kept.back());
    };
    Backward call{};
    call.head = p.head;
    call.up.nll = values("nll", nll, rows);
    call.up.lse = values("lse", lse, rows);
    call.up.lse_low = values("lse_low", lse_low, rows);
    call.up.d_nll = values("d_nll", d_nll, rows);
    call.up.d_lse = values("d_lse", d_lse, rows);
    if (d_mean) {
      call.up.mean = values("mean", mean, rows);
      call.up.d_mean = values("d_mean", *d_mean, rows);
    }
    if (d_class) call.up.d_class = values("d_class", *d_class, rows);
    if (scale) call.up.scale = values("scale", *scale, rows);
    // a gradient of the weighted logit sum is dense
    if (filtered && !d_class) {
      call.masses = masses.data_ptr();
      call.summary = static_cast<const double*>(summary.data_ptr());
    }
    call.seed = seed;
    call.lean = Engine::kLean && lean;
    GradTensors grads(p, e.size(1), need_e, need_c, need_bias);
    call.out = grads.out;
    engine.run(op, e, call);
    return grads.finish();
  }

  using FusedTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static FusedTensors fused(const Tensor& e, const Tensor& c, const Tensor& targets,
                            const std::optional<Tensor>& bias, const Tensor& nll_coef,
                            const Tensor& lse2_coef, double softcap, double logit_scale,
                            double temperature, int64_t ignore_index, bool lean, bool need_e,
                            bool need_c, bool need_bias) {
    const char* op = "cce_fused";
    Engine engine(op, e);
    const std::optional<Tensor> none;
    const Prepared p(
        op, {e, c, targets, bias, none, softcap, logit_scale, temperature, ignore_index, false});
    const int64_t rows = p.head.N;
    const Tensor nll_scale = float_values(op, "nll_coef", nll_coef, rows);
    const Tensor lse2_scale = float_values(op, "lse2_coef", lse2_coef, rows);
    Tensor loss = new_empty(e, {}, ScalarType::Float);
    Tensor nll = new_empty(e, {rows}, ScalarType::Float);
    Tensor lse = new_empty(e, {rows}, ScalarType::Float);
    GradTensors grads(p, e.size(1), need_e, need_c, need_bias);
    Fused call{};
    call.head = p.head;
    call.nll_coef = floats(nll_scale);
    call.lse2_coef = floats(lse2_scale);
    call.loss = floats(loss);
    call.nll = floats(nll);
    call.lse = floats(lse);
    call.out = grads.out;
    call.lean = Engine::kLean && lean;
    engine.run(op, e, call);
    const auto [de, dc, dbias] = grads.finish();
    return {loss, nll, lse, de, dc, dbias};
  }

  static void scale(const Tensor& x, const Tensor& factor) {
    const char* op = "cce_scale_";
    Engine engine(op, x);
    STD_TORCH_CHECK(Engine::here(x) && x.is_contiguous(), op, ": expected x to be contiguous");
    STD_TORCH_CHECK(
        Engine::here(factor) && factor.numel() == 1 && factor.scalar_type() == ScalarType::Float,
        op, ": expected factor to be one float32 on the device of x");
    const Scale call{x.mutable_data_ptr(), storage_type(op, "x", x), x.numel(), floats(factor)};
    engine.run(op, x, call);
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("cce_forward", TORCH_BOX(&Binding::forward));
    m.impl("cce_backward", TORCH_BOX(&Binding::backward));
    m.impl("cce_fused", TORCH_BOX(&Binding::fused));
    m.impl("cce_scale_", TORCH_BOX(&Binding::scale));
  }
};

}  // namespace gemma_ext::cce
