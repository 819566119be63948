// SPDX-License-Identifier: Apache-2.0
// Cut cross-entropy between tensors and an engine: checks, results, the calls, once for both.
//
// An engine, made per call from (op, e), has
//   here(t)                 whether t lies where it computes
//   matrix(op, name, t)     t [rows, columns] with strides that it takes, a padded copy if need be
//   run(op, like, call)     a call of contract.h
#pragma once

#include <tuple>

#include "common/torch/tensors.h"
#include "contract.h"

namespace gemma_ext::cce {

using torch::stable::new_empty;

struct HeadTensors {
  const Tensor &e, &c, &targets;
  const std::optional<Tensor>&bias, &class_weight, &order;
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
      if (h.order) {
        check_vector(op, "order", *h.order, head.V);
        STD_TORCH_CHECK(h.order->scalar_type() == ScalarType::Long && h.order->is_contiguous(), op,
                        ": expected order to be contiguous int64");
        head.order = static_cast<const int64_t*>(h.order->data_ptr());
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

  using RowTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static RowTensors forward(const Tensor& e, const Tensor& c, const Tensor& targets,
                            const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& class_weight,
                            const std::optional<Tensor>& order,
                            const std::optional<Tensor>& /*prob*/, double softcap,
                            double logit_scale, double temperature, int64_t ignore_index,
                            bool allow_missing, double filter_eps, bool want_stats, bool want_mean,
                            bool want_argmax) {
    const char* op = "cce_forward";
    Engine engine(op, e);
    const Prepared p(op, {e, c, targets, bias, class_weight, order, softcap, logit_scale,
                          temperature, ignore_index, allow_missing});
    const int64_t rows = p.head.N, tiles = tiles_of(p.head.V);
    const auto vector = [&](bool wanted) {
      return new_empty(e, {wanted ? rows : 0}, ScalarType::Float);
    };
    Tensor nll = vector(true), lse = vector(true), mean = vector(want_mean);
    Tensor class_sum = vector(class_weight.has_value());
    Tensor argmax = new_empty(e, {want_argmax ? rows : 0}, ScalarType::Long);
    Tensor summary = new_empty(e, {4}, ScalarType::Double);
    Tensor stats = new_empty(
        e, {want_stats ? 3 + want_mean : 0, want_stats ? tiles : 0, want_stats ? rows : 0},
        ScalarType::Float);
    Forward call{};
    call.head = p.head;
    call.out = {floats(nll), floats(lse), want_mean ? floats(mean) : nullptr,
                class_weight ? floats(class_sum) : nullptr,
                want_argmax ? static_cast<int64_t*>(argmax.mutable_data_ptr()) : nullptr};
    call.stats = want_stats ? floats(stats) : nullptr;
    call.summary = static_cast<double*>(summary.mutable_data_ptr());
    call.eps = filter_eps;
    engine.run(op, e, call);
    return {nll, lse, mean, class_sum, argmax, stats, summary};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(
      const Tensor& e, const Tensor& c, const Tensor& targets, const std::optional<Tensor>& bias,
      const std::optional<Tensor>& class_weight, const std::optional<Tensor>& order,
      const std::optional<Tensor>& prob, const Tensor& nll, const Tensor& lse, const Tensor& mean,
      const Tensor& stats, const Tensor& summary, const Tensor& d_nll, const Tensor& d_lse,
      const std::optional<Tensor>& d_mean, const std::optional<Tensor>& d_class, double softcap,
      double logit_scale, double temperature, int64_t ignore_index, bool allow_missing, bool need_e,
      bool need_c, bool need_bias) {
    const char* op = "cce_backward";
    Engine engine(op, e);
    const Prepared p(op, {e, c, targets, bias, class_weight, order, softcap, logit_scale,
                          temperature, ignore_index, allow_missing});
    const int64_t rows = p.head.N, tiles = tiles_of(p.head.V);
    const bool has_mean = mean.numel() > 0 && stats.size(0) > 3;
    STD_TORCH_CHECK(stats.dim() == 3 && stats.is_contiguous() && stats.size(1) == tiles &&
                        stats.size(2) == rows && stats.scalar_type() == ScalarType::Float,
                    op, ": expected stats of the same forward, [planes, ", tiles, ", ", rows, "]");
    STD_TORCH_CHECK(summary.numel() == 4 && summary.scalar_type() == ScalarType::Double, op,
                    ": expected summary to be [4] float64");
    STD_TORCH_CHECK(!d_mean || has_mean || rows == 0, op,
                    ": expected a forward with want_mean for d_mean");
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
    call.up.d_nll = values("d_nll", d_nll, rows);
    call.up.d_lse = values("d_lse", d_lse, rows);
    if (d_mean) {
      call.up.mean = values("mean", mean, rows);
      call.up.d_mean = values("d_mean", *d_mean, rows);
    }
    if (d_class) call.up.d_class = values("d_class", *d_class, rows);
    if (prob) call.prob = values("prob", *prob, p.head.V);
    call.stats = floats(stats);
    // a gradient of the weighted logit sum is dense
    call.summary = d_class ? nullptr : static_cast<const double*>(summary.data_ptr());
    GradTensors grads(p, e.size(1), need_e, need_c, need_bias);
    call.out = grads.out;
    engine.run(op, e, call);
    return grads.finish();
  }

  using FusedTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static FusedTensors fused(const Tensor& e, const Tensor& c, const Tensor& targets,
                            const std::optional<Tensor>& bias, const Tensor& nll_coef,
                            const Tensor& lse2_coef, double softcap, double logit_scale,
                            double temperature, int64_t ignore_index, bool need_e, bool need_c,
                            bool need_bias) {
    const char* op = "cce_fused";
    Engine engine(op, e);
    const std::optional<Tensor> none;
    const Prepared p(op, {e, c, targets, bias, none, none, softcap, logit_scale, temperature,
                          ignore_index, false});
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
    engine.run(op, e, call);
    const auto [de, dc, dbias] = grads.finish();
    return {loss, nll, lse, de, dc, dbias};
  }

  static std::tuple<Tensor, Tensor> column_stats(
      const Tensor& e, const Tensor& c, const Tensor& targets, const std::optional<Tensor>& bias,
      const Tensor& lse, double softcap, double logit_scale, double temperature,
      int64_t ignore_index, double eps, int64_t max_rows) {
    const char* op = "cce_column_stats";
    STD_TORCH_CHECK(max_rows > 0, op, ": expected max_rows to be positive, got ", max_rows);
    Engine engine(op, e);
    const std::optional<Tensor> none;
    const Prepared p(op, {e, c, targets, bias, none, none, softcap, logit_scale, temperature,
                          ignore_index, true});
    const Tensor row_lse = float_values(op, "lse", lse, p.head.N);
    Tensor count = new_empty(e, {p.head.V}, ScalarType::Float);
    Tensor prob = new_empty(e, {p.head.V}, ScalarType::Float);
    ColumnStats call{p.head,   floats(row_lse), static_cast<float>(eps),
                     max_rows, floats(count),   floats(prob)};
    engine.run(op, e, call);
    return {count, prob};
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("cce_forward", TORCH_BOX(&Binding::forward));
    m.impl("cce_backward", TORCH_BOX(&Binding::backward));
    m.impl("cce_fused", TORCH_BOX(&Binding::fused));
    m.impl("cce_column_stats", TORCH_BOX(&Binding::column_stats));
  }
};

}  // namespace gemma_ext::cce
