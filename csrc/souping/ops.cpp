// SPDX-License-Identifier: Apache-2.0
// Weight-space merging: schemas and the CPU engine.
#include "common/torch/cpu.h"
#include "souping/binding.h"
#include "souping/cpu/engine.h"

#define GEMMA_EXT_PARTS "Tensor[] sources, Tensor[] bases, "
#define GEMMA_EXT_RANDOM "int[] offsets, int[] keys, int[] models, "
#define GEMMA_EXT_MASK                                                      \
  "Tensor? keep, Tensor(k!)? keep_ties, bool keep_variance, Tensor? drop, " \
  "Tensor(d!)? drop_ties, bool drop_variance, Tensor? density, Tensor? rows, bool by_value, "

namespace gemma_ext::souping {
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

  template <class Call>
  void run(const char*, const Tensor&, const Call& call) {
    cpu::run(call, workers);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gemma_ext, m) {
  m.def("soup_(" GEMMA_EXT_PARTS
        "Tensor(a!)[] outs, int[] offsets, int[] keys, Tensor weights, Tensor scale, "
        "bool by_row, bool wide, bool stochastic) -> ()");
  m.def("soup_merge_(" GEMMA_EXT_PARTS "Tensor(a!)[] outs, " GEMMA_EXT_RANDOM
        "int election, bool weighted, int zero, int combine, " GEMMA_EXT_MASK
        "bool rescale, Tensor weights, Tensor divide, Tensor? alone, Tensor scale, bool wide, "
        "bool stochastic) -> ()");
  m.def("soup_survey_(" GEMMA_EXT_PARTS
        "int[] groups, bool variance, Tensor(a!) coarse, Tensor(b!) zeros, Tensor(c!)? odd, "
        "Tensor? window, Tensor? prefix, Tensor(d!)? fine) -> ()");
  m.def("soup_sums_(" GEMMA_EXT_PARTS "Tensor[] extras, " GEMMA_EXT_RANDOM
        "int[] groups, int sum, " GEMMA_EXT_MASK "Tensor(a!) state, Tensor(b!)? top) -> ()");
  m.def("soup_gram_rows(" GEMMA_EXT_PARTS "int models) -> Tensor");
  m.def("soup_counts(" GEMMA_EXT_PARTS GEMMA_EXT_RANDOM
        "int parts, int count, int election, bool weighted, " GEMMA_EXT_MASK
        "bool rescale, Tensor weights, Tensor divide) -> Tensor");
  m.def("soup_apply_(" GEMMA_EXT_PARTS "Tensor[] extras, Tensor(a!)[] outs, " GEMMA_EXT_RANDOM
        "int element, Tensor numbers, int votes, int task, bool stochastic) -> ()");
  m.def(
      "soup_swarm_(Tensor(a!)[] xs, Tensor(b!)[] vs, Tensor[] pulls, int[] offsets, int[] keys, "
      "Tensor numbers, bool stochastic) -> ()");
  m.def("soup_gather_rows_(Tensor(a!) out, Tensor[] sources, Tensor rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gemma_ext, CPU, m) { Binding<Cpu>::register_in(m); }

}  // namespace gemma_ext::souping
