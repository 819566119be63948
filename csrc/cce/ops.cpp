// SPDX-License-Identifier: Apache-2.0
// Cut cross-entropy: schemas and the CPU engine.
#include "cce/cpu/engine.h"
#include "cce/divergence_binding.h"
#include "common/torch/cpu.h"

namespace gemma_ext::cce {
namespace {

struct Cpu {
  static constexpr bool kLean = false, kOneDtype = false;
  Workers workers;

  Cpu(const char*, const Tensor&)
      : workers(int(torch::stable::get_num_threads()), [](int64_t n, const Workers::Range& range) {
          torch::stable::parallel_for(0, n, 1, range);
        }) {
    checked_isa();
  }

  static bool here(const Tensor& t) { return t.is_cpu(); }

  static Tensor matrix(const char*, const char*, const Tensor& t) {
    const bool fits = t.stride(0) <= INT32_MAX && t.stride(1) <= INT32_MAX;
    return fits ? t : torch::stable::contiguous(t);
  }

  template <class Call>
  void run(const char*, const Tensor&, const Call& call) {
    const cpu::Status status = cpu::run(call, workers);
    if constexpr (requires { call.heads; })
      check_labels(status, call.heads.student);
    else if constexpr (!std::is_same_v<Call, Scale>)
      check_labels(status, call.head);
  }

  static void check_labels(const cpu::Status& status, const Head& head) {
    STD_TORCH_CHECK(status.bad_label_at < 0, "expected targets in [0, ", head.V,
                    ") or ignore_index ", head.ignore_index, ", got ", status.bad_label,
                    " at flat position ", status.bad_label_at);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gemma_ext, m) {
  m.def(
      "cce_forward(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? class_weight, "
      "float softcap, float logit_scale, float temperature, int ignore_index, bool allow_missing, "
      "float filter_eps, bool want_mean, bool want_argmax, bool lean, bool want_moments=False) "
      "-> (Tensor nll, Tensor lse, Tensor lse_low, Tensor mean, Tensor class_sum, Tensor argmax, "
      "Tensor masses, Tensor summary, Tensor log_squares, Tensor average)");
  m.def(
      "cce_backward(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? class_weight, "
      "Tensor nll, Tensor lse, Tensor lse_low, Tensor mean, Tensor masses, Tensor summary, "
      "Tensor? scale, Tensor d_nll, Tensor d_lse, Tensor? d_mean, Tensor? d_class, "
      "float softcap, float logit_scale, float temperature, int ignore_index, "
      "bool allow_missing, int seed, bool lean, bool need_e, bool need_c, bool need_bias) "
      "-> (Tensor de, Tensor dc, Tensor dbias)");
  m.def(
      "cce_fused(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor nll_coef, "
      "Tensor lse2_coef, float softcap, float logit_scale, float temperature, int ignore_index, "
      "bool lean, bool need_e, bool need_c, bool need_bias) "
      "-> (Tensor loss, Tensor nll, Tensor lse, Tensor de, Tensor dc, Tensor dbias)");
  m.def("cce_scale_(Tensor(a!) x, Tensor factor) -> ()");
  m.def(
      "cce_divergence_forward(Tensor e, Tensor c, Tensor? bias, Tensor teacher_e, "
      "Tensor teacher_c, Tensor? teacher_bias, Tensor targets, int kind, float beta, "
      "float softcap, float logit_scale, float temperature, float teacher_softcap, "
      "float teacher_logit_scale, float teacher_temperature, int ignore_index, float filter_eps) "
      "-> (Tensor divergence, Tensor nll, Tensor lse, Tensor teacher_nll, Tensor state, "
      "Tensor masses, Tensor summary)");
  m.def(
      "cce_divergence_backward(Tensor e, Tensor c, Tensor? bias, Tensor teacher_e, "
      "Tensor teacher_c, Tensor? teacher_bias, Tensor targets, Tensor nll, Tensor lse, "
      "Tensor state, Tensor masses, Tensor summary, Tensor d_divergence, Tensor d_nll, "
      "Tensor d_lse, int kind, float beta, float softcap, float logit_scale, float temperature, "
      "float teacher_softcap, float teacher_logit_scale, float teacher_temperature, "
      "int ignore_index, int seed, bool need_e, bool need_c, bool need_bias) "
      "-> (Tensor de, Tensor dc, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(gemma_ext, CPU, m) {
  Binding<Cpu>::register_in(m);
  DivergenceBinding<Cpu>::register_in(m);
}

}  // namespace gemma_ext::cce
