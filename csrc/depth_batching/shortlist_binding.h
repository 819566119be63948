// SPDX-License-Identifier: Apache-2.0
// The shortlist between tensors and an engine.
#pragma once

#include "head_binding.h"

namespace gemma_ext::depth_batching {

template <class Engine>
struct ShortlistBinding {
  using Heads = HeadBinding<Engine>;
  using Maybe = std::optional<Tensor>;

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shortlist(
      const Tensor& h, const Maybe& norm_weight, const Tensor& weight, const Maybe& bias,
      const Tensor& codes, const Tensor& code_scale, const Tensor& slack, double eps, bool plus_one,
      double softcap, double logit_scale, int64_t candidates) {
    const char* op = "depth_shortlist";
    Engine engine(op, h);
    const typename Heads::Prepared p(op, h, norm_weight, weight, bias, eps, plus_one, softcap,
                                     logit_scale);
    const int64_t n = p.head.n;
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char, op, ": expected codes to be int8");
    Heads::Linears::check(op, "codes", codes, p.head.V, p.head.D);
    STD_TORCH_CHECK(candidates >= 1 && candidates <= p.head.V && candidates <= kMostShortlist, op,
                    ": expected candidates in [1, min(V, ", kMostShortlist, ")], got ", candidates);
    const Tensor whole = Engine::matrix(op, "codes", torch::stable::contiguous(codes));
    const Tensor scales = Heads::numbers(op, "code_scale", code_scale, p.head.V);
    const Tensor slacks = Heads::numbers(op, "slack", slack, p.head.V);
    std::vector<Tensor> out;
    Shortlist call{};
    call.head = p.head;
    call.codes = static_cast<const int8_t*>(whole.data_ptr());
    call.code_stride = whole.stride(0);
    call.code_scale = floats(scales);
    call.slack = floats(slacks);
    call.candidates = candidates;
    call.ids = Heads::made_ids(out, h, {n});
    call.top = Heads::made(out, h, {n, 2});
    call.rest = Heads::made(out, h, {n});
    call.low = Heads::made(out, h, {n});
    call.high = Heads::made(out, h, {n});
    engine.run(op, h, call);
    return {out[0], out[1], out[2], out[3], out[4]};
  }

  template <class Library>
  static void define_in(Library& m) {
    m.def(
        "depth_shortlist(Tensor h, Tensor? norm_weight, Tensor weight, Tensor? bias, "
        "Tensor codes, Tensor code_scale, Tensor slack, float eps, bool plus_one, float softcap, "
        "float logit_scale, int candidates) -> "
        "(Tensor ids, Tensor top, Tensor rest, Tensor low, Tensor high)");
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("depth_shortlist", TORCH_BOX(&ShortlistBinding::shortlist));
  }
};

}  // namespace gemma_ext::depth_batching
