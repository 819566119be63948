// SPDX-License-Identifier: Apache-2.0
// Sparse dictionaries: schemas and the CPU engine.
#include "common/torch/cpu.h"
#include "sae/cpu/engine.h"
#include "sae/encode_binding.h"

#define GEMMA_EXT_ENCODER "Tensor x, Tensor weight, Tensor? bias"

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
}

STABLE_TORCH_LIBRARY_IMPL(gemma_ext, CPU, m) { EncodeBinding<Cpu>::register_in(m); }

}  // namespace gemma_ext::sae
