// SPDX-License-Identifier: Apache-2.0
// Divergence of two heads between tensors and an engine; the engine is that of binding.h and has besides
//   kOneDtype    whether both heads must be of one dtype
#pragma once

#include <string>

#include "binding.h"
#include "divergence.h"

namespace gemma_ext::cce {

struct TwoHeadTensors {
  HeadTensors student, teacher;
  int64_t kind;
  double beta;
};

template <class Engine>
struct DivergenceBinding {
  using Base = Binding<Engine>;
  using Prepared = typename Base::Prepared;

  static constexpr int kStates = 5;  // lse_low, teacher_lse, teacher_low, mean, size

  static Tensor as(const Tensor& t, const Tensor& like) {
    return Engine::kOneDtype ? torch::stable::to(t, like.scalar_type()) : t;
  }

  // The heads and the tensors their pointers lead to.
  struct PreparedPair {
    std::string of_teacher;  // for messages
    Tensor teacher_e, teacher_c;
    Prepared student, teacher;
    TwoHeads heads{};

    PreparedPair(const char* op, const TwoHeadTensors& h)
        : of_teacher(std::string(op) + ", teacher"),
          teacher_e(as(h.teacher.e, h.student.e)),
          teacher_c(as(h.teacher.c, h.student.e)),
          student(op, h.student),
          teacher(of_teacher.c_str(),
                  {teacher_e, teacher_c, h.teacher.targets, h.teacher.bias, h.teacher.class_weight,
                   h.teacher.softcap, h.teacher.logit_scale, h.teacher.temperature,
                   h.teacher.ignore_index, h.teacher.allow_missing}) {
      STD_TORCH_CHECK(student.head.V == teacher.head.V, op, ": expected teacher_c to have ",
                      student.head.V, " rows, got ", teacher.head.V);
      STD_TORCH_CHECK(0 <= h.kind && h.kind <= int64_t{3}, op, ": expected kind in [0, 3], got ",
                      h.kind);
      heads.student = student.head;
      heads.teacher = teacher.head;
      heads.kind = static_cast<Kind>(h.kind);
      heads.beta = static_cast<float>(h.beta);
    }
  };

  static DivergenceRows rows_at(const Tensor& divergence, const Tensor& nll, const Tensor& lse,
                                const Tensor& teacher_nll, const Tensor& state, int64_t n) {
    float* const next = floats(state);
    return {floats(divergence), floats(nll),  floats(lse),  floats(teacher_nll), next,
            next + n,           next + 2 * n, next + 3 * n, next + 4 * n};
  }

  using Forwarded = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Forwarded forward(const Tensor& e, const Tensor& c, const std::optional<Tensor>& bias,
                           const Tensor& teacher_e, const Tensor& teacher_c,
                           const std::optional<Tensor>& teacher_bias, const Tensor& targets,
                           int64_t kind, double beta, double softcap, double logit_scale,
                           double temperature, double teacher_softcap, double teacher_logit_scale,
                           double teacher_temperature, int64_t ignore_index, double filter_eps) {
    const char* op = "cce_divergence_forward";
    Engine engine(op, e);
    const std::optional<Tensor> none;
    const PreparedPair p(
        op, {{e, c, targets, bias, none, softcap, logit_scale, temperature, ignore_index, false},
             {teacher_e, teacher_c, targets, teacher_bias, none, teacher_softcap,
              teacher_logit_scale, teacher_temperature, ignore_index, false},
             kind,
             beta});
    const int64_t n = p.heads.student.N;
    const bool filtered = filter_eps != 0;
    const auto vector = [&] { return new_empty(e, {n}, ScalarType::Float); };
    Tensor divergence = vector(), nll = vector(), lse = vector(), teacher_nll = vector();
    Tensor state = new_empty(e, {kStates, n}, ScalarType::Float);
    Tensor masses = new_empty(
        e, {filtered ? 2 : 0, filtered ? tiles_of(p.heads.student.V) : 0, filtered ? n : 0},
        ScalarType::Float);
    Tensor summary = new_empty(e, {3}, ScalarType::Double);
    DivergenceForward call{};
    call.heads = p.heads;
    call.out = rows_at(divergence, nll, lse, teacher_nll, state, n);
    call.masses = filtered ? floats(masses) : nullptr;
    call.summary = static_cast<double*>(summary.mutable_data_ptr());
    call.eps = filter_eps;
    engine.run(op, e, call);
    return {divergence, nll, lse, teacher_nll, state, masses, summary};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(
      const Tensor& e, const Tensor& c, const std::optional<Tensor>& bias, const Tensor& teacher_e,
      const Tensor& teacher_c, const std::optional<Tensor>& teacher_bias, const Tensor& targets,
      const Tensor& nll, const Tensor& lse, const Tensor& state, const Tensor& masses,
      const Tensor& summary, const Tensor& d_divergence, const Tensor& d_nll, const Tensor& d_lse,
      int64_t kind, double beta, double softcap, double logit_scale, double temperature,
      double teacher_softcap, double teacher_logit_scale, double teacher_temperature,
      int64_t ignore_index, int64_t seed, bool need_e, bool need_c, bool need_bias) {
    const char* op = "cce_divergence_backward";
    Engine engine(op, e);
    const std::optional<Tensor> none;
    const PreparedPair p(
        op, {{e, c, targets, bias, none, softcap, logit_scale, temperature, ignore_index, false},
             {teacher_e, teacher_c, targets, teacher_bias, none, teacher_softcap,
              teacher_logit_scale, teacher_temperature, ignore_index, false},
             kind,
             beta});
    const int64_t n = p.heads.student.N, tiles = tiles_of(p.heads.student.V);
    const bool filtered = masses.numel() > 0;
    STD_TORCH_CHECK(state.dim() == 2 && state.size(0) == kStates && state.size(1) == n &&
                        state.is_contiguous() && state.scalar_type() == ScalarType::Float,
                    op, ": expected state of the same forward, [", kStates, ", ", n, "]");
    STD_TORCH_CHECK(
        !filtered || (masses.dim() == 3 && masses.size(0) == 2 && masses.size(1) == tiles &&
                      masses.size(2) == n && masses.is_contiguous() &&
                      masses.scalar_type() == ScalarType::Float),
        op, ": expected masses of the same forward, [2, ", tiles, ", ", n, "], or empty");
    STD_TORCH_CHECK(summary.numel() == 3 && summary.scalar_type() == ScalarType::Double, op,
                    ": expected summary to be [3] float64");
    std::vector<Tensor> kept;
    const auto values = [&](const char* name, const Tensor& t) {
      kept.push_back(Base::float_values(op, name, t, n));
      return floats(kept.back());
    };
    DivergenceBackward call{};
    call.heads = p.heads;
    float* const next = floats(state);
    call.rows.nll = values("nll", nll);
    call.rows.lse = values("lse", lse);
    call.rows.lse_low = next;
    call.rows.teacher_lse = next + n;
    call.rows.teacher_low = next + 2 * n;
    call.rows.mean = next + 3 * n;
    call.rows.size = next + 4 * n;
    call.d_divergence = values("d_divergence", d_divergence);
    call.d_nll = values("d_nll", d_nll);
    call.d_lse = values("d_lse", d_lse);
    if (filtered) {
      call.masses = floats(masses);
      call.summary = static_cast<const double*>(summary.data_ptr());
    }
    call.seed = seed;
    typename Base::GradTensors grads(p.student, e.size(1), need_e, need_c, need_bias);
    call.out = grads.out;
    engine.run(op, e, call);
    return grads.finish();
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("cce_divergence_forward", TORCH_BOX(&DivergenceBinding::forward));
    m.impl("cce_divergence_backward", TORCH_BOX(&DivergenceBinding::backward));
  }
};

}  // namespace gemma_ext::cce
