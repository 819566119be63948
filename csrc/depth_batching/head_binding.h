// SPDX-License-Identifier: Apache-2.0
// The head, gates and noise between tensors and an engine: checks, memory of the results, the calls.
//
// An engine is that of kv_binding.h.
#pragma once

#include "head.h"
#include "linear_binding.h"

namespace gemma_ext::depth_batching {

template <class Engine>
struct HeadBinding {
  using Linears = LinearBinding<Engine>;
  using Maybe = std::optional<Tensor>;

  // [n] contiguous of a type; float32 converted where it is not.
  static Tensor numbers(const char* op, const char* name, const Tensor& t, int64_t n) {
    storage_type(op, name, t);
    return Linears::vector(op, name, torch::stable::to(t, ScalarType::Float), n);
  }

  static Tensor flags(const char* op, const char* name, const Tensor& t, int64_t n) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Bool, op, ": expected ", name, " to be bool");
    return Linears::vector(op, name, t, n);
  }

  static Tensor keys_of(const char* op, const Tensor& keys, int64_t n) {
    STD_TORCH_CHECK(keys.scalar_type() == ScalarType::Long, op, ": expected keys to be int64");
    Linears::check(op, "keys", keys, n, 3);
    return torch::stable::contiguous(keys);
  }

  // The head and the tensors that its pointers lead to.
  struct Prepared {
    Tensor h, weight;
    Maybe norm, bias;
    Head head{};

    Prepared(const char* op, const Tensor& given, const Maybe& norm_weight, const Tensor& w,
             const Maybe& given_bias, double eps, bool plus_one, double softcap, double scale)
        : h(Linears::rows(op, "h", given, -1, w.dim() == 2 ? w.size(1) : -1)),
          weight(Linears::rows(op, "weight", w, -1, given.size(1))) {
      head.n = given.size(0);
      head.D = given.size(1);
      head.V = weight.size(0);
      STD_TORCH_CHECK(head.V > 0 && head.V <= INT32_MAX, op,
                      ": expected weight to have 1 to 2^31 - 1 rows");
      head.h = h.data_ptr();
      head.h_stride = h.stride(0);
      head.h_type = storage_type(op, "h", h);
      head.weight = weight.data_ptr();
      head.w_stride = weight.stride(0);
      head.type = storage_type(op, "weight", weight);
      if (norm_weight) {
        norm = Linears::vector(op, "norm_weight", *norm_weight, head.D);
        head.norm_weight = norm->data_ptr();
        head.norm_type = storage_type(op, "norm_weight", *norm_weight);
      }
      STD_TORCH_CHECK(norm_weight || head.type == head.h_type, op,
                      ": expected h and weight of one dtype where no norm comes between");
      head.norm = {float(eps), plus_one};
      if (given_bias) {
        bias = numbers(op, "bias", *given_bias, head.V);
        head.bias = floats(*bias);
      }
      head.scale = float(scale);
      head.cap = float(softcap);
    }
  };

  static float* made(std::vector<Tensor>& kept, const Tensor& like,
                     std::initializer_list<int64_t> shape) {
    kept.push_back(torch::stable::new_empty(like, shape, ScalarType::Float));
    return static_cast<float*>(kept.back().mutable_data_ptr());
  }
  static int32_t* made_ids(std::vector<Tensor>& kept, const Tensor& like,
                           std::initializer_list<int64_t> shape) {
    kept.push_back(torch::stable::new_empty(like, shape, ScalarType::Int));
    return static_cast<int32_t*>(kept.back().mutable_data_ptr());
  }
  static uint8_t* made_flags(std::vector<Tensor>& kept, const Tensor& like, int64_t n) {
    kept.push_back(torch::stable::new_empty(like, {n}, ScalarType::Bool));
    return static_cast<uint8_t*>(kept.back().mutable_data_ptr());
  }

  using ExitTensors =
      std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static ExitTensors head_exit(const Tensor& h, const Maybe& norm_weight, const Tensor& weight,
                               const Maybe& bias, const Maybe& threshold, const Maybe& temperature,
                               const Maybe& keys, const Maybe& skip, double eps, bool plus_one,
                               double softcap, double logit_scale, int64_t mode, bool strict,
                               int64_t candidates) {
    const char* op = "depth_head_exit";
    Engine engine(op, h);
    const Prepared p(op, h, norm_weight, weight, bias, eps, plus_one, softcap, logit_scale);
    const int64_t n = p.head.n;
    STD_TORCH_CHECK(mode >= kNever && mode <= kEntropy && (mode == kNever) == !threshold, op,
                    ": expected a threshold with a mode of 1 to 3, and none with 0");
    STD_TORCH_CHECK(temperature.has_value() == keys.has_value(), op,
                    ": expected temperature and keys together");
    STD_TORCH_CHECK(candidates >= 0 && candidates <= p.head.V && candidates <= kMostCandidates, op,
                    ": expected candidates in [0, min(V, ", kMostCandidates, ")], got ",
                    candidates);
    HeadExit call{};
    call.head = p.head;
    call.mode = ExitMode(mode);
    call.strict = strict;
    call.candidates = candidates;
    Maybe limit, heat, seeds, skipped;
    if (skip) {
      skipped = flags(op, "skip", *skip, n);
      call.skip = static_cast<const uint8_t*>(skipped->data_ptr());
    }
    if (threshold) {
      limit = numbers(op, "threshold", *threshold, n);
      call.threshold = floats(*limit);
    }
    if (temperature) {
      heat = numbers(op, "temperature", *temperature, n);
      call.temperature = floats(*heat);
      seeds = keys_of(op, *keys, n);
      call.keys = static_cast<const int64_t*>(seeds->data_ptr());
    }
    std::vector<Tensor> kept;
    const int64_t drawn = temperature ? n : 0;
    call.ids = made_ids(kept, h, {n});
    call.top = made(kept, h, {n, 2});
    call.lse = made(kept, h, {n});
    call.entropy = made(kept, h, {n});
    call.exits = made_flags(kept, h, threshold ? n : 0);
    call.samples = made_ids(kept, h, {drawn});
    call.tempered = made(kept, h, {drawn});
    call.values = made(kept, h, {n, candidates});
    call.indices = made_ids(kept, h, {n, candidates});
    engine.run(op, h, call);
    return {kept[0], kept[1], kept[2], kept[3], kept[4], kept[5], kept[6], kept[7], kept[8]};
  }

  static Tensor gumbel(const Tensor& ids, const Tensor& keys) {
    const char* op = "depth_gumbel";
    Engine engine(op, ids);
    STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Int && ids.dim() == 2, op,
                    ": expected ids to be int32 [n, C]");
    const Tensor given = torch::stable::contiguous(ids);
    const Tensor seeds = keys_of(op, keys, ids.size(0));
    std::vector<Tensor> kept;
    Noise call{static_cast<const int32_t*>(given.data_ptr()),
               static_cast<const int64_t*>(seeds.data_ptr()), ids.size(0), ids.size(1), nullptr};
    call.out = made(kept, ids, {call.n, call.C});
    engine.run(op, ids, call);
    return kept[0];
  }

  static std::tuple<Tensor, Tensor, Tensor> gate_exit(const Tensor& h, const Maybe& previous,
                                                      const Maybe& weight, const Maybe& bias,
                                                      const Maybe& survival,
                                                      const Tensor& threshold, const Maybe& last,
                                                      int64_t mode, bool strict) {
    const char* op = "depth_gate_exit";
    Engine engine(op, h);
    STD_TORCH_CHECK(h.dim() == 2 && Engine::here(h), op, ": expected h to be [n, D]");
    STD_TORCH_CHECK(mode >= kGate && mode <= kLatentDiff, op, ": expected mode in [0, 3]");
    const bool learned = mode == kGate || mode == kHazard;
    STD_TORCH_CHECK(weight.has_value() == learned && previous.has_value() == !learned &&
                        survival.has_value() == (mode == kHazard),
                    op, ": expected weight, or previous, and survival as the mode has them");
    Gate call{};
    call.mode = GateMode(mode);
    call.strict = strict;
    call.type = storage_type(op, "h", h);
    call.n = h.size(0);
    call.D = h.size(1);
    std::vector<Tensor> kept;
    const auto keep = [&](const char* name, Tensor t) {
      STD_TORCH_CHECK(storage_type(op, name, t) == call.type, op, ": expected ", name,
                      " in the dtype of h");
      kept.push_back(torch::stable::contiguous(t));
      return kept.back().data_ptr();
    };
    call.h = keep("h", h);
    if (weight) call.weight = keep("weight", Linears::vector(op, "weight", *weight, call.D));
    if (previous) {
      Linears::check(op, "previous", *previous, call.n, call.D);
      call.previous = keep("previous", *previous);
    }
    const auto keep_numbers = [&](const char* name, const Tensor& t, int64_t n) {
      kept.push_back(numbers(op, name, t, n));
      return floats(kept.back());
    };
    if (bias) call.bias = keep_numbers("bias", *bias, 1);
    if (survival) call.survival = keep_numbers("survival", *survival, call.n);
    call.threshold = keep_numbers("threshold", threshold, call.n);
    if (last) {
      kept.push_back(flags(op, "last", *last, call.n));
      call.last = static_cast<const uint8_t*>(kept.back().data_ptr());
    }
    std::vector<Tensor> out;
    call.exits = made_flags(out, h, call.n);
    call.scores = made(out, h, {call.n});
    call.after = made(out, h, {survival ? call.n : 0});
    engine.run(op, h, call);
    return {out[0], out[1], out[2]};
  }

  template <class Library>
  static void define_in(Library& m) {
    m.def(
        "depth_head_exit(Tensor h, Tensor? norm_weight, Tensor weight, Tensor? bias, "
        "Tensor? threshold, Tensor? temperature, Tensor? keys, Tensor? skip, float eps, "
        "bool plus_one, float softcap, float logit_scale, int mode, bool strict, int candidates) "
        "-> "
        "(Tensor ids, Tensor top, Tensor lse, Tensor entropy, Tensor exits, Tensor samples, "
        "Tensor tempered, Tensor values, Tensor indices)");
    m.def("depth_gumbel(Tensor ids, Tensor keys) -> Tensor");
    m.def(
        "depth_gate_exit(Tensor h, Tensor? previous, Tensor? weight, Tensor? bias, "
        "Tensor? survival, Tensor threshold, Tensor? last, int mode, bool strict) -> "
        "(Tensor exits, Tensor scores, Tensor survival)");
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("depth_head_exit", TORCH_BOX(&HeadBinding::head_exit));
    m.impl("depth_gumbel", TORCH_BOX(&HeadBinding::gumbel));
    m.impl("depth_gate_exit", TORCH_BOX(&HeadBinding::gate_exit));
  }
};

}  // namespace gemma_ext::depth_batching
