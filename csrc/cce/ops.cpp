// SPDX-License-Identifier: Apache-2.0
// Cut cross-entropy: schemas and the CPU binding.
#include <stdlib.h>

#include <algorithm>
#include <cmath>

#include "cce/cpu/plan.h"
#include "common/torch/tensors.h"

namespace gemma_ext::cce {
namespace {

using torch::stable::new_empty;

struct Head {
  const Tensor &e, &c, &targets;
  const std::optional<Tensor>&bias, &class_weight, &order;
  double softcap, logit_scale, temperature;
  int64_t ignore_index;
  bool allow_missing;
};

// The problem and the memory its pointers lead to.
struct Prepared {
  Problem problem{};
  std::vector<float> bias, class_weight;
  std::vector<int64_t> rows, position, inverse;
};

Matrix matrix(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": expected ", name, " to have 2 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.is_cpu(), op, ": expected ", name, " on the CPU");
  return {t.data_ptr(), storage_type(op, name, t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

void check_vector(const char* op, const char* name, const Tensor& t, int64_t n) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, op, ": expected ", name, " to be [", n, "]");
  STD_TORCH_CHECK(t.is_cpu(), op, ": expected ", name, " on the CPU");
}

void read_labels(const char* op, const Head& h, Prepared& out) {
  const int64_t n = h.targets.size(0), step = h.targets.stride(0), vocab = h.c.size(0);
  const bool narrow = h.targets.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(narrow || h.targets.scalar_type() == ScalarType::Long, op,
                  ": expected targets to be int32 or int64");
  for (int64_t i = 0; i < n; ++i) {
    const int64_t label = narrow ? static_cast<const int32_t*>(h.targets.data_ptr())[i * step]
                                 : static_cast<const int64_t*>(h.targets.data_ptr())[i * step];
    if (label == h.ignore_index) continue;
    const bool inside = label >= 0 && label < vocab;
    STD_TORCH_CHECK(inside || h.allow_missing, "expected targets in [0, ", vocab,
                    ") or ignore_index ", h.ignore_index, ", got ", label, " at flat position ", i);
    out.rows.push_back(i);
    out.position.push_back(!inside ? -1 : out.inverse.empty() ? label : out.inverse[label]);
  }
}

const Kernels& checked_kernels() {
  const Kernels* chosen = chosen_kernels();
  STD_TORCH_CHECK(chosen, "expected GEMMA_EXT_CPU_ISA to be baseline, avx2, avx512 or avx512bf16, ",
                  "and one that this processor runs, got ", getenv("GEMMA_EXT_CPU_ISA"));
  return *chosen;
}

void prepare(const char* op, const Head& h, Prepared& out) {
  checked_kernels();
  Problem& p = out.problem;
  p.e = matrix(op, "e", h.e);
  p.c = matrix(op, "c", h.c);
  STD_TORCH_CHECK(p.e.dtype == p.c.dtype, op, ": expected e and c to have one dtype");
  STD_TORCH_CHECK(p.e.cols == p.c.cols, op, ": expected c to be [V, ", p.e.cols, "], got [",
                  p.c.rows, ", ", p.c.cols, "]");
  STD_TORCH_CHECK(p.c.rows > 0, op, ": expected c to have at least one row");
  check_vector(op, "targets", h.targets, p.e.rows);
  p.V = p.c.rows;
  p.D = p.c.cols;
  p.tiles = (p.V + kTile - 1) / kTile;
  p.map = logit_map(h.softcap, h.logit_scale, h.temperature);
  if (h.bias) {
    check_vector(op, "bias", *h.bias, p.V);
    out.bias = to_floats(op, "bias", *h.bias);
    p.bias = out.bias.data();
  }
  if (h.class_weight) {
    check_vector(op, "class_weight", *h.class_weight, p.V);
    out.class_weight = to_floats(op, "class_weight", *h.class_weight);
    p.class_weight = out.class_weight.data();
  }
  if (h.order) {
    check_vector(op, "order", *h.order, p.V);
    STD_TORCH_CHECK(h.order->scalar_type() == ScalarType::Long && h.order->is_contiguous(), op,
                    ": expected order to be contiguous int64");
    p.order = static_cast<const int64_t*>(h.order->data_ptr());
    out.inverse.assign(p.V, -1);
    for (int64_t i = 0; i < p.V; ++i) {
      STD_TORCH_CHECK(p.order[i] >= 0 && p.order[i] < p.V && out.inverse[p.order[i]] < 0, op,
                      ": expected order to be a permutation of the vocabulary, broken at ", i);
      out.inverse[p.order[i]] = i;
    }
  }
  read_labels(op, h, out);
  p.n = int64_t(out.rows.size());
  p.rows = out.rows.data();
  p.position = out.position.data();
}

Workers make_workers() {
  return Workers(int(torch::stable::get_num_threads()), [](int64_t n, const Workers::Range& range) {
    torch::stable::parallel_for(0, n, 1, range);
  });
}

template <class T>
void scatter(const Problem& p, const std::vector<T>& compact, void* full) {
  for (int64_t i = 0; i < p.n; ++i) static_cast<T*>(full)[p.rows[i]] = compact[i];
}

std::vector<float> compact(const char* op, const char* name, const Problem& p, const Tensor& t) {
  check_vector(op, name, t, p.e.rows);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": expected ", name, " to be float32");
  std::vector<float> out(p.n);
  for (int64_t i = 0; i < p.n; ++i) out[i] = floats(t)[p.rows[i] * t.stride(0)];
  return out;
}

// Gradient tensors of the wanted inputs; empty ones stand for the others.
struct GradTensors {
  Tensor de, dc, dbias;
  Gradients out{};

  GradTensors(const Problem& p, const Head& h, bool need_e, bool need_c, bool need_bias)
      : de(new_empty(h.e, {need_e ? p.e.rows : 0, need_e ? p.D : 0})),
        dc(new_empty(h.c, {need_c ? p.V : 0, need_c ? p.D : 0})),
        dbias(float_vector(h.e, need_bias ? p.V : 0)) {
    if (need_e && p.n < p.e.rows) torch::stable::zero_(de);
    if (need_c && p.n == 0) torch::stable::zero_(dc);
    if (need_e && p.n) out.de = de.mutable_data_ptr();
    if (need_c && p.n) out.dc = dc.mutable_data_ptr();
    if (need_bias && p.n) out.dbias = floats(dbias);
  }
};

using RowTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

RowTensors forward_cpu(const Tensor& e, const Tensor& c, const Tensor& targets,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& class_weight,
                       const std::optional<Tensor>& order, const std::optional<Tensor>& /*prob*/,
                       double softcap, double logit_scale, double temperature, int64_t ignore_index,
                       bool allow_missing, double filter_eps, bool want_stats, bool want_mean,
                       bool want_argmax) {
  const Head head{e,       c,           targets,     bias,         class_weight, order,
                  softcap, logit_scale, temperature, ignore_index, allow_missing};
  Prepared prepared;
  prepare("cce_forward", head, prepared);
  Problem& p = prepared.problem;
  p.want_mean = want_mean;
  p.want_argmax = want_argmax;

  const int64_t rows = e.size(0), planes = kStatPlanes + want_mean;
  Tensor stats =
      new_empty(e, {want_stats ? planes : 0, want_stats ? p.tiles : 0, want_stats ? rows : 0},
                ScalarType::Float);
  const int64_t used = planes * p.tiles * p.n;  // ignored rows have no strips: the rest is zero
  if (want_stats) std::fill(floats(stats) + used, floats(stats) + stats.numel(), 0.0f);
  std::vector<float> own(want_stats ? 0 : used);
  const StripStats strips = stat_planes(want_stats ? floats(stats) : own.data(), p);

  std::vector<float> nll(p.n), lse(p.n), mean(p.n), class_sum(p.n);
  std::vector<int64_t> argmax(p.n);
  const RowOutputs out{nll.data(), lse.data(), mean.data(), class_sum.data(), argmax.data()};
  Workers workers = make_workers();
  forward(p, strips, out, workers);

  Tensor all_nll = float_vector(e, rows), all_lse = float_vector(e, rows);
  scatter(p, nll, all_nll.mutable_data_ptr());
  scatter(p, lse, all_lse.mutable_data_ptr());
  Tensor all_mean = float_vector(e, want_mean ? rows : 0);
  if (want_mean) scatter(p, mean, all_mean.mutable_data_ptr());
  Tensor all_class = float_vector(e, class_weight ? rows : 0);
  if (class_weight) scatter(p, class_sum, all_class.mutable_data_ptr());
  Tensor all_argmax = new_empty(e, {want_argmax ? rows : 0}, ScalarType::Long);
  torch::stable::fill_(all_argmax, -1);
  if (want_argmax) scatter(p, argmax, all_argmax.mutable_data_ptr());

  Tensor summary = new_empty(e, {4}, ScalarType::Double);
  const FilterReport kept =
      want_stats && filter_eps != 0 ? report(p, strips, out, filter_eps, workers) : FilterReport{};
  double* values = static_cast<double*>(summary.mutable_data_ptr());
  values[0] = kept.kept;
  values[1] = kept.dropped_mean;
  values[2] = kept.dropped_max;
  values[3] = kept.eps;
  return {all_nll, all_lse, all_mean, all_class, all_argmax, stats, summary};
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& e, const Tensor& c, const Tensor& targets, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& class_weight, const std::optional<Tensor>& order,
    const std::optional<Tensor>& prob, const Tensor& nll, const Tensor& lse, const Tensor& mean,
    const Tensor& stats, const Tensor& summary, const Tensor& d_nll, const Tensor& d_lse,
    const std::optional<Tensor>& d_mean, const std::optional<Tensor>& d_class, double softcap,
    double logit_scale, double temperature, int64_t ignore_index, bool allow_missing, bool need_e,
    bool need_c, bool need_bias) {
  const char* op = "cce_backward";
  const Head head{e,       c,           targets,     bias,         class_weight, order,
                  softcap, logit_scale, temperature, ignore_index, allow_missing};
  Prepared prepared;
  prepare(op, head, prepared);
  Problem& p = prepared.problem;
  p.want_mean = mean.numel() > 0 && stats.size(0) > kStatPlanes;
  STD_TORCH_CHECK(stats.dim() == 3 && stats.is_contiguous() && stats.size(1) == p.tiles &&
                      stats.size(2) == p.e.rows && stats.scalar_type() == ScalarType::Float,
                  op, ": expected stats of the same forward, [planes, ", p.tiles, ", ", p.e.rows,
                  "]");
  STD_TORCH_CHECK(summary.numel() == 4 && summary.scalar_type() == ScalarType::Double, op,
                  ": expected summary to be [4] float64");
  STD_TORCH_CHECK(!d_mean || p.want_mean, op, ": expected a forward with want_mean for d_mean");
  STD_TORCH_CHECK(!d_class || class_weight, op, ": expected class_weight for d_class");

  std::vector<float> column_prob;
  if (prob) {
    check_vector(op, "prob", *prob, p.V);
    column_prob = to_floats(op, "prob", *prob);
  }
  const std::vector<float> row_nll = compact(op, "nll", p, nll),
                           row_lse = compact(op, "lse", p, lse);
  std::vector<float> row_mean, q, class_coef;
  std::vector<float> b = compact(op, "d_nll", p, d_nll), a = compact(op, "d_lse", p, d_lse);
  for (int64_t r = 0; r < p.n; ++r) a[r] += b[r];
  if (d_mean) {
    row_mean = compact(op, "mean", p, mean);
    q = compact(op, "d_mean", p, *d_mean);
    for (int64_t r = 0; r < p.n; ++r) a[r] += q[r];
  }
  if (d_class) class_coef = compact(op, "d_class", p, *d_class);
  for (int64_t r = 0; r < p.n; ++r)
    if (p.position[r] < 0) b[r] = 0;

  const double eps = static_cast<const double*>(summary.data_ptr())[3];
  GradTensors grads(p, head, need_e, need_c, need_bias);
  const Upstream up{row_lse.data(),
                    row_nll.data(),
                    d_mean ? row_mean.data() : nullptr,
                    a.data(),
                    b.data(),
                    d_mean ? q.data() : nullptr,
                    d_class ? class_coef.data() : nullptr};
  Workers workers = make_workers();
  if (p.n)
    backward(p, stat_planes(floats(stats), p), up, prob ? column_prob.data() : nullptr,
             d_class ? 0 : eps, grads.out, workers);
  return {grads.de, grads.dc, grads.dbias};
}

using FusedTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

FusedTensors fused_cpu(const Tensor& e, const Tensor& c, const Tensor& targets,
                       const std::optional<Tensor>& bias, const Tensor& nll_coef,
                       const Tensor& lse2_coef, double softcap, double logit_scale,
                       double temperature, int64_t ignore_index, bool need_e, bool need_c,
                       bool need_bias) {
  const char* op = "cce_fused";
  const std::optional<Tensor> none;
  const Head head{e,       c,           targets,     bias,         none, none,
                  softcap, logit_scale, temperature, ignore_index, false};
  Prepared prepared;
  prepare(op, head, prepared);
  const Problem& p = prepared.problem;
  const std::vector<float> a = compact(op, "nll_coef", p, nll_coef);
  const std::vector<float> z = compact(op, "lse2_coef", p, lse2_coef);
  std::vector<float> nll(p.n), lse(p.n);
  const RowOutputs rows{nll.data(), lse.data(), nullptr, nullptr, nullptr};
  GradTensors grads(p, head, need_e, need_c, need_bias);
  Workers workers = make_workers();
  Tensor loss = new_empty(e, {}, ScalarType::Float);
  *floats(loss) = float(fused(p, a.data(), z.data(), rows, grads.out, workers));
  Tensor all_nll = float_vector(e, e.size(0)), all_lse = float_vector(e, e.size(0));
  scatter(p, nll, all_nll.mutable_data_ptr());
  scatter(p, lse, all_lse.mutable_data_ptr());
  return {loss, all_nll, all_lse, grads.de, grads.dc, grads.dbias};
}

std::tuple<Tensor, Tensor> column_stats_cpu(const Tensor& e, const Tensor& c, const Tensor& targets,
                                            const std::optional<Tensor>& bias, const Tensor& lse,
                                            double softcap, double logit_scale, double temperature,
                                            int64_t ignore_index, double eps, int64_t max_rows) {
  const char* op = "cce_column_stats";
  const std::optional<Tensor> none;
  const Head head{e,       c,           targets,     bias,         none, none,
                  softcap, logit_scale, temperature, ignore_index, true};
  Prepared prepared;
  prepare(op, head, prepared);
  Problem& p = prepared.problem;
  STD_TORCH_CHECK(max_rows > 0, op, ": expected max_rows to be positive, got ", max_rows);
  const int64_t step = std::max<int64_t>(1, (p.n + max_rows - 1) / max_rows);
  std::vector<int64_t> sample;
  for (int64_t i = 0; i < p.n; i += step) sample.push_back(prepared.rows[i]);
  p.rows = sample.data();
  p.n = int64_t(sample.size());
  const std::vector<float> row_lse = compact(op, "lse", p, lse);
  Tensor count = float_vector(e, p.V), mass = float_vector(e, p.V);
  Workers workers = make_workers();
  column_stats(p, row_lse.data(), float(eps), floats(count), floats(mass), workers);
  return {count, mass};
}

std::string cpu_isa() { return checked_kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gemma_ext, m) {
  m.def(
      "cce_forward(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? class_weight, "
      "Tensor? order, Tensor? prob, float softcap, float logit_scale, float temperature, "
      "int ignore_index, bool allow_missing, float filter_eps, bool want_stats, bool want_mean, "
      "bool want_argmax) -> (Tensor nll, Tensor lse, Tensor mean, Tensor class_sum, "
      "Tensor argmax, Tensor stats, Tensor summary)");
  m.def(
      "cce_backward(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? class_weight, "
      "Tensor? order, Tensor? prob, Tensor nll, Tensor lse, Tensor mean, Tensor stats, "
      "Tensor summary, Tensor d_nll, Tensor d_lse, Tensor? d_mean, Tensor? d_class, "
      "float softcap, float logit_scale, float temperature, int ignore_index, "
      "bool allow_missing, bool need_e, bool need_c, bool need_bias) "
      "-> (Tensor de, Tensor dc, Tensor dbias)");
  m.def(
      "cce_fused(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor nll_coef, "
      "Tensor lse2_coef, float softcap, float logit_scale, float temperature, int ignore_index, "
      "bool need_e, bool need_c, bool need_bias) "
      "-> (Tensor loss, Tensor nll, Tensor lse, Tensor de, Tensor dc, Tensor dbias)");
  m.def(
      "cce_column_stats(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor lse, "
      "float softcap, float logit_scale, float temperature, int ignore_index, float eps, "
      "int max_rows) -> (Tensor count, Tensor prob)");
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(gemma_ext, CPU, m) {
  m.impl("cce_forward", TORCH_BOX(&forward_cpu));
  m.impl("cce_backward", TORCH_BOX(&backward_cpu));
  m.impl("cce_fused", TORCH_BOX(&fused_cpu));
  m.impl("cce_column_stats", TORCH_BOX(&column_stats_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(gemma_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace gemma_ext::cce
