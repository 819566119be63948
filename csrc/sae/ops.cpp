// SPDX-License-Identifier: Apache-2.0
// Sparse dictionaries: schemas and the CPU engine.
#include "common/torch/cpu.h"
#include "sae/cpu/engine.h"
#include "sae/cpu/products.h"
#include "sae/cpu/steer.h"
#include "sae/encode_binding.h"
#include "sae/products_binding.h"
#include "sae/steer_binding.h"

#define GEMMA_EXT_ENCODER "Tensor x, Tensor weight, Tensor? bias"
#define GEMMA_EXT_LISTS "Tensor values, Tensor indices, Tensor? offsets, Tensor? counts, "

namespace gemma_ext::sae {
namespace {

struct Cpu {
  Workers workers;

  Cpu(const char*, const Tensor&)
      : workers(int(torch::stable::get_num_threads()), [](int64_t n, const Workers::Range& range) {
          torch::stable::parallel_for(0, n, 1, range);
        }) {
    checked_isa();
  }

  static bool here(const Tensor& t) { return t.is_cpu(); }

  static Tensor matrix(const char*, const char*, const Tensor& t) { return t; }

  template <class Call>
  static void check(const char* op, const Call& call) {
    const cpu::Wrong wrong = cpu::find_wrong(call);
    STD_TORCH_CHECK(!wrong.what, op, ": expected ", wrong.what, " in [0, ", wrong.end, "), got ",
                    wrong.value, " at ", wrong.at);
  }

  template <class Call, class... Memory>
  void run(const char*, const Tensor&, const Call& call, const Memory&... memory) {
    cpu::run(call, memory..., workers);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gemma_ext, m) {
  m.def("sae_topk(" GEMMA_EXT_ENCODER
        ", Tensor? scale, Tensor? aux_mask, int k, int k_aux, bool by_magnitude) "
        "-> (Tensor values, Tensor indices, Tensor aux_values, Tensor aux_indices)");
  m.def("sae_group_max(" GEMMA_EXT_ENCODER ", int groups) -> (Tensor values, Tensor indices)");
  m.def("sae_batch_topk(" GEMMA_EXT_ENCODER
        ", Tensor? scale, Tensor? aux_mask, int total, int k_aux) "
        "-> (Tensor values, Tensor indices, Tensor offsets, Tensor min_positive, "
        "Tensor aux_values, Tensor aux_indices)");
  // capacity -1: lists of the length that is needed
  m.def("sae_threshold(" GEMMA_EXT_ENCODER
        ", Tensor? scale, Tensor limit, Tensor? aux_mask, bool inclusive, int capacity, "
        "int k_aux) -> (Tensor values, Tensor indices, Tensor offsets, Tensor counts, "
        "Tensor aux_values, Tensor aux_indices)");

  m.def("sae_decode(" GEMMA_EXT_LISTS "Tensor weight, Tensor? bias) -> Tensor");
  m.def("sae_decode_error(" GEMMA_EXT_LISTS
        "Tensor weight, Tensor? bias, Tensor target) -> (Tensor residual, Tensor squared)");
  // rows_only: of d_weight the rows of the features `touched`, as many as there are
  m.def("sae_decode_backward(" GEMMA_EXT_LISTS
        "Tensor weight, Tensor grad, Tensor? scale, bool unit_norm, bool rows_only, "
        "bool need_values, bool need_weight, bool need_bias) "
        "-> (Tensor d_values, Tensor d_weight, Tensor d_bias, Tensor touched)");
  m.def("sae_scatter(" GEMMA_EXT_LISTS
        "Tensor rows, int features) -> (Tensor sums, Tensor totals)");
  // no widths: levels are places in a token's list
  m.def("sae_nested(" GEMMA_EXT_LISTS
        "Tensor weight, Tensor? bias, Tensor target, int[] widths) -> Tensor");
  m.def("sae_nested_backward(" GEMMA_EXT_LISTS
        "Tensor weight, Tensor? bias, Tensor target, int[] widths, Tensor d_squared, "
        "bool unit_norm, bool need_values, bool need_weight, bool need_bias, bool need_target) "
        "-> (Tensor d_values, Tensor d_weight, Tensor d_bias, Tensor d_target)");
  m.def(
      "sae_steer(Tensor x, Tensor decoder, Tensor encoder, Tensor tables, Tensor offsets, "
      "Tensor latents, Tensor modes, Tensor amounts, Tensor gates, Tensor state, Tensor? reads, "
      "Tensor? writes) -> (Tensor out, Tensor state_after)");
}

STABLE_TORCH_LIBRARY_IMPL(gemma_ext, CPU, m) {
  EncodeBinding<Cpu>::register_in(m);
  ProductsBinding<Cpu>::register_in(m);
  SteerBinding<Cpu>::register_in(m);
}

}  // namespace gemma_ext::sae
