// SPDX-License-Identifier: Apache-2.0
// Depth batching: schemas and the CPU engine.
#include "common/torch/cpu.h"
#include "depth_batching/cpu/engine.h"
#include "depth_batching/cpu/head_engine.h"
#include "depth_batching/cpu/linear_engine.h"
#include "depth_batching/cpu/propagate_engine.h"
#include "depth_batching/head_binding.h"
#include "depth_batching/kv_binding.h"
#include "depth_batching/linear_binding.h"
#include "depth_batching/propagate_binding.h"
#include "depth_batching/shortlist_binding.h"

#define GEMMA_EXT_PLACES "Tensor block_tables, Tensor row_req, Tensor row_pos, Tensor row_loop, "

namespace gemma_ext::depth_batching {
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
  void run(const char* op, const Tensor&, const Call& call) {
    const cpu::Wrong wrong = cpu::find_wrong(call);
    STD_TORCH_CHECK(!wrong.what, op, ": expected ", wrong.what, " in [", wrong.begin, ", ",
                    wrong.end, "), got ", wrong.value, " at ", wrong.at);
    cpu::run(call, workers);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gemma_ext, m) {
  m.def(
      "depth_compact(Tensor loop, Tensor leave, Tensor? drop, int loops) "
      "-> (Tensor order, Tensor next_loop, Tensor seg_offsets, Tensor counts)");
  m.def("rope_kv_write(Tensor q, Tensor k, Tensor v, Tensor(a!) kv_pool, " GEMMA_EXT_PLACES
        "Tensor depth_of, Tensor? rope, Tensor? rope_of, Tensor? q_norm, Tensor? k_norm, "
        "float eps, bool plus_one, Tensor(b!)? fill_mark) -> Tensor");
  m.def("paged_attn_mixed_depth(Tensor q, Tensor kv_pool, " GEMMA_EXT_PLACES
        "Tensor depth_of, Tensor? window, float scale, float softcap, int sinks=0) -> Tensor");
  m.def("kv_copy(Tensor(a!) kv_pool, " GEMMA_EXT_PLACES
        "Tensor depths, Tensor(b!)? fill_mark) -> ()");
  LinearBinding<Cpu>::define_in(m);
  HeadBinding<Cpu>::define_in(m);
  ShortlistBinding<Cpu>::define_in(m);
  PropagateBinding<Cpu>::define_in(m);
}

STABLE_TORCH_LIBRARY_IMPL(gemma_ext, CPU, m) {
  KvBinding<Cpu>::register_in(m);
  LinearBinding<Cpu>::register_in(m);
  HeadBinding<Cpu>::register_in(m);
  ShortlistBinding<Cpu>::register_in(m);
  PropagateBinding<Cpu>::register_in(m);
}

}  // namespace gemma_ext::depth_batching
