// SPDX-License-Identifier: Apache-2.0
// Cut cross-entropy: the CUDA binding of the ops that ops.cpp declares. Nothing here waits for the
// device: a label outside [0, V) makes its nll, and so the loss, NaN.
#include <stdlib.h>

#include <algorithm>

#include "cce/cuda/launch.h"
#include "common/torch/cuda.h"

namespace gemma_ext::cce {
namespace {

using cuda::ceil_div;
using torch::stable::new_empty;

struct HeadTensors {
  const Tensor &e, &c, &targets;
  const std::optional<Tensor>&bias, &class_weight, &order;
  double softcap, logit_scale, temperature;
  int64_t ignore_index;
  bool allow_missing;
};

void check_vector(const char* op, const char* name, const Tensor& t, int64_t n) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, op, ": expected ", name, " to be [", n, "]");
  STD_TORCH_CHECK(on_device(t), op, ": expected ", name, " on the device of e");
}

// [n] contiguous float32, converted where it is not.
Tensor float_values(const char* op, const char* name, const Tensor& t, int64_t n) {
  check_vector(op, name, t, n);
  storage_type(op, name, t);
  return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
}

// Rows of whole 16-byte words at multiples of 16 bytes, one behind the other as TMA wants them; a copy
// with zeros behind where t has none.
Tensor word_rows(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": expected ", name, " to have 2 dimensions, got ", t.dim());
  STD_TORCH_CHECK(on_device(t), op, ": expected ", name, " on the device of e");
  const int64_t word = 16 / size_of(storage_type(op, name, t)), width = t.size(1);
  const bool fits = t.stride(1) == 1 && t.stride(0) % word == 0 && width % word == 0 &&
                    t.stride(0) >= width && t.stride(0) <= INT32_MAX &&
                    reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  if (fits) return t;
  Tensor padded = torch::stable::new_zeros(t, {t.size(0), ceil_div(width, word) * word});
  Tensor inside = torch::stable::narrow(padded, 1, 0, width);
  torch::stable::copy_(inside, t);
  return padded;
}

// The problem and the tensors its pointers lead to.
struct Prepared {
  Tensor e, c;
  std::optional<Tensor> bias, class_weight;
  cuda::Head head{};

  Prepared(const char* op, const HeadTensors& h)
      : e(word_rows(op, "e", h.e)), c(word_rows(op, "c", h.c)) {
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

// Memory for gradient strips: GEMMA_EXT_CCE_WORKSPACE_MB, 256 by default.
int64_t strip_bytes() {
  const char* asked = getenv("GEMMA_EXT_CCE_WORKSPACE_MB");
  const int64_t megabytes = asked && *asked ? strtoll(asked, nullptr, 10) : 256;
  STD_TORCH_CHECK(megabytes > 0,
                  "expected GEMMA_EXT_CCE_WORKSPACE_MB to be a positive number, got ", asked);
  return megabytes << 20;
}

// `call` needs temporary memory, which lives until the stream has passed it.
template <class Call, class Run, class Size>
void run(const char* op, const OnDevice& device, const Tensor& like, Call& call, Size size,
         Run run) {
  Tensor workspace = new_empty(like, {size(call)}, ScalarType::Byte);
  call.workspace = workspace.mutable_data_ptr();
  const cuda::Status status = run(call, device.stream);
  STD_TORCH_CHECK(status == 0, op, ": ", cuda::status_text(status));
}

// Gradient tensors of the wanted inputs; empty ones stand for the others.
struct GradTensors {
  int64_t width;
  Tensor de, dc, dbias;
  cuda::Gradients out{};

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

RowTensors forward_cuda(const Tensor& e, const Tensor& c, const Tensor& targets,
                        const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& class_weight,
                        const std::optional<Tensor>& order, const std::optional<Tensor>& /*prob*/,
                        double softcap, double logit_scale, double temperature,
                        int64_t ignore_index, bool allow_missing, double filter_eps,
                        bool want_stats, bool want_mean, bool want_argmax) {
  const char* op = "cce_forward";
  const OnDevice device(e);
  const Prepared p(op, {e, c, targets, bias, class_weight, order, softcap, logit_scale, temperature,
                        ignore_index, allow_missing});
  const int64_t rows = p.head.N, tiles = cuda::tiles_of(p.head.V);
  const auto vector = [&](bool wanted) {
    return new_empty(e, {wanted ? rows : 0}, ScalarType::Float);
  };
  Tensor nll = vector(true), lse = vector(true), mean = vector(want_mean);
  Tensor class_sum = vector(class_weight.has_value());
  Tensor argmax = new_empty(e, {want_argmax ? rows : 0}, ScalarType::Long);
  Tensor summary = new_empty(e, {4}, ScalarType::Double);
  Tensor stats =
      new_empty(e, {want_stats ? 3 + want_mean : 0, want_stats ? tiles : 0, want_stats ? rows : 0},
                ScalarType::Float);
  cuda::Forward call{};
  call.head = p.head;
  call.out = {floats(nll), floats(lse), want_mean ? floats(mean) : nullptr,
              class_weight ? floats(class_sum) : nullptr,
              want_argmax ? static_cast<int64_t*>(argmax.mutable_data_ptr()) : nullptr};
  call.stats = want_stats ? floats(stats) : nullptr;
  call.summary = static_cast<double*>(summary.mutable_data_ptr());
  call.eps = filter_eps;
  call.copy_bytes = int64_t{64} << 20;  // about what L2 holds
  run(op, device, e, call, cuda::forward_workspace, cuda::forward);
  return {nll, lse, mean, class_sum, argmax, stats, summary};
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& e, const Tensor& c, const Tensor& targets, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& class_weight, const std::optional<Tensor>& order,
    const std::optional<Tensor>& prob, const Tensor& nll, const Tensor& lse, const Tensor& mean,
    const Tensor& stats, const Tensor& summary, const Tensor& d_nll, const Tensor& d_lse,
    const std::optional<Tensor>& d_mean, const std::optional<Tensor>& d_class, double softcap,
    double logit_scale, double temperature, int64_t ignore_index, bool allow_missing, bool need_e,
    bool need_c, bool need_bias) {
  const char* op = "cce_backward";
  const OnDevice device(e);
  const Prepared p(op, {e, c, targets, bias, class_weight, order, softcap, logit_scale, temperature,
                        ignore_index, allow_missing});
  const int64_t rows = p.head.N, tiles = cuda::tiles_of(p.head.V);
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
  cuda::Backward call{};
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
  call.strip_bytes = strip_bytes();
  run(op, device, e, call, cuda::backward_workspace, cuda::backward);
  return grads.finish();
}

using FusedTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

FusedTensors fused_cuda(const Tensor& e, const Tensor& c, const Tensor& targets,
                        const std::optional<Tensor>& bias, const Tensor& nll_coef,
                        const Tensor& lse2_coef, double softcap, double logit_scale,
                        double temperature, int64_t ignore_index, bool need_e, bool need_c,
                        bool need_bias) {
  const char* op = "cce_fused";
  const OnDevice device(e);
  const std::optional<Tensor> none;
  const Prepared p(op, {e, c, targets, bias, none, none, softcap, logit_scale, temperature,
                        ignore_index, false});
  const int64_t rows = p.head.N;
  const Tensor nll_scale = float_values(op, "nll_coef", nll_coef, rows);
  const Tensor lse2_scale = float_values(op, "lse2_coef", lse2_coef, rows);
  Tensor loss = new_empty(e, {}, ScalarType::Float);
  Tensor nll = new_empty(e, {rows}, ScalarType::Float),
         lse = new_empty(e, {rows}, ScalarType::Float);
  GradTensors grads(p, e.size(1), need_e, need_c, need_bias);
  cuda::Fused call{};
  call.head = p.head;
  call.nll_coef = floats(nll_scale);
  call.lse2_coef = floats(lse2_scale);
  call.loss = floats(loss);
  call.nll = floats(nll);
  call.lse = floats(lse);
  call.out = grads.out;
  call.strip_bytes = strip_bytes();
  run(op, device, e, call, cuda::fused_workspace, cuda::fused);
  const auto [de, dc, dbias] = grads.finish();
  return {loss, nll, lse, de, dc, dbias};
}

std::tuple<Tensor, Tensor> column_stats_cuda(const Tensor& e, const Tensor& c,
                                             const Tensor& targets,
                                             const std::optional<Tensor>& bias, const Tensor& lse,
                                             double softcap, double logit_scale, double temperature,
                                             int64_t ignore_index, double eps, int64_t max_rows) {
  const char* op = "cce_column_stats";
  STD_TORCH_CHECK(max_rows > 0, op, ": expected max_rows to be positive, got ", max_rows);
  const OnDevice device(e);
  const std::optional<Tensor> none;
  const Prepared p(
      op, {e, c, targets, bias, none, none, softcap, logit_scale, temperature, ignore_index, true});
  const Tensor row_lse = float_values(op, "lse", lse, p.head.N);
  Tensor count = new_empty(e, {p.head.V}, ScalarType::Float);
  Tensor prob = new_empty(e, {p.head.V}, ScalarType::Float);
  cuda::ColumnStats call{p.head,   floats(row_lse), static_cast<float>(eps),
                         max_rows, floats(count),   floats(prob),
                         nullptr};
  run(op, device, e, call, cuda::column_stats_workspace, cuda::column_stats);
  return {count, prob};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gemma_ext, GEMMA_EXT_DEVICE_KEY, m) {
  m.impl("cce_forward", TORCH_BOX(&forward_cuda));
  m.impl("cce_backward", TORCH_BOX(&backward_cuda));
  m.impl("cce_fused", TORCH_BOX(&fused_cuda));
  m.impl("cce_column_stats", TORCH_BOX(&column_stats_cuda));
}

}  // namespace gemma_ext::cce
