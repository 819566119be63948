// SPDX-License-Identifier: Apache-2.0
// Encoders between tensors and an engine: checks, memory of the results, the calls, for both engines.
//
// An engine, made per call from (op, x), has
//   here(t)                          whether t lies where it computes
//   matrix(op, name, t)              t [rows, columns] with strides that it takes, a copy if need be
//   run(op, like, call)              a call of contract.h
//   run(op, like, call, allocate)    Threshold into lists of the length that is needed
#pragma once

#include <functional>
#include <tuple>

#include "common/torch/tensors.h"
#include "contract.h"

namespace gemma_ext::sae {

using torch::stable::new_empty;
using Maybe = std::optional<Tensor>;

using Allocate = std::function<Entries(int64_t nnz)>;

template <class Engine>
struct EncodeBinding {
  static void check_vector(const char* op, const char* name, const Tensor& t, int64_t n) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, op, ": expected ", name, " to be [", n, "]");
    STD_TORCH_CHECK(Engine::here(t), op, ": expected ", name, " on the device of x");
  }

  // [n] contiguous float32, converted where it is not.
  static Tensor float_values(const char* op, const char* name, const Tensor& t, int64_t n) {
    check_vector(op, name, t, n);
    return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
  }

  static Tensor matrix(const char* op, const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 2, op, ": expected ", name, " to have 2 dimensions, got ", t.dim());
    STD_TORCH_CHECK(Engine::here(t), op, ": expected ", name, " on the device of x");
    storage_type(op, name, t);
    return Engine::matrix(op, name, t);
  }

  static int32_t* ints(const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }
  static int64_t* longs(const Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); }

  // The encoder and the tensors its pointers lead to.
  struct Prepared {
    const char* op;
    Engine engine;
    Tensor x, weight;
    Maybe bias, scale, mask;
    Encoder encoder{};

    Prepared(const char* op, const Tensor& given, const Tensor& given_weight,
             const Maybe& given_bias, const Maybe& given_scale)
        : op(op),
          engine(op, given),
          x(matrix(op, "x", given)),
          weight(matrix(op, "weight", given_weight)) {
      STD_TORCH_CHECK(given.scalar_type() == given_weight.scalar_type(), op,
                      ": expected x and weight to have one dtype");
      STD_TORCH_CHECK(given.size(1) == given_weight.size(1), op, ": expected weight to be [F, ",
                      given.size(1), "], got [", given_weight.size(0), ", ", given_weight.size(1),
                      "]");
      const int64_t N = given.size(0), F = given_weight.size(0);
      STD_TORCH_CHECK(F >= 1 && F <= INT32_MAX && N <= INT32_MAX, op,
                      ": expected 1 to 2^31 - 1 rows of weight and fewer than 2^31 of x");
      if (given_bias) bias = float_values(op, "bias", *given_bias, F);
      if (given_scale) scale = float_values(op, "scale", *given_scale, F);
      encoder = {x.data_ptr(),
                 weight.data_ptr(),
                 x.stride(0),
                 x.stride(1),
                 weight.stride(0),
                 weight.stride(1),
                 storage_type(op, "x", x),
                 bias ? floats(*bias) : nullptr,
                 scale ? floats(*scale) : nullptr,
                 N,
                 F,
                 x.size(1)};
    }

    void check_count(const char* name, int64_t value, int64_t least, int64_t most) const {
      STD_TORCH_CHECK(value >= least && value <= most, op, ": expected ", name, " in [", least,
                      ", ", most, "], got ", value);
    }

    Tensor values(int64_t columns) const {
      return new_empty(x, {encoder.N, columns}, ScalarType::Float);
    }
    Tensor indices(int64_t columns) const {
      return new_empty(x, {encoder.N, columns}, ScalarType::Int);
    }

    Aux aux(const Maybe& given, int64_t k, const Tensor& values, const Tensor& indices) {
      if (!given) return {};
      check_vector(op, "aux_mask", *given, encoder.F);
      STD_TORCH_CHECK(given->scalar_type() == ScalarType::Bool, op,
                      ": expected aux_mask to be bool");
      check_count("k_aux", k, 1, encoder.F);
      mask = torch::stable::contiguous(*given);
      return {static_cast<const uint8_t*>(mask->data_ptr()), k, floats(values), ints(indices)};
    }
  };

  using Lists = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static Lists topk(const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& scale,
                    const Maybe& aux_mask, int64_t k, int64_t k_aux, bool by_magnitude) {
    Prepared p("sae_topk", x, weight, bias, scale);
    p.check_count("k", k, 1, p.encoder.F);
    const Tensor values = p.values(k), indices = p.indices(k);
    const Tensor aux_values = p.values(aux_mask ? k_aux : 0);
    const Tensor aux_indices = p.indices(aux_mask ? k_aux : 0);
    const TopK call{p.encoder,      by_magnitude,  k,
                    floats(values), ints(indices), p.aux(aux_mask, k_aux, aux_values, aux_indices)};
    p.engine.run(p.op, x, call);
    return {values, indices, aux_values, aux_indices};
  }

  static std::tuple<Tensor, Tensor> group_max(const Tensor& x, const Tensor& weight,
                                              const Maybe& bias, int64_t groups) {
    Prepared p("sae_group_max", x, weight, bias, {});
    p.check_count("groups", groups, 1, p.encoder.F);
    STD_TORCH_CHECK(p.encoder.F % groups == 0, p.op, ": expected groups to divide ", p.encoder.F,
                    " features, got ", groups);
    const Tensor values = p.values(groups), indices = p.indices(groups);
    p.engine.run(p.op, x, GroupMax{p.encoder, groups, floats(values), ints(indices)});
    return {values, indices};
  }

  using BatchLists = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static BatchLists batch_topk(const Tensor& x, const Tensor& weight, const Maybe& bias,
                               const Maybe& scale, const Maybe& aux_mask, int64_t total,
                               int64_t k_aux) {
    Prepared p("sae_batch_topk", x, weight, bias, scale);
    p.check_count("total", total, 0, p.encoder.N * p.encoder.F);
    const Tensor values = new_empty(x, {total}, ScalarType::Float);
    const Tensor indices = new_empty(x, {total}, ScalarType::Int);
    const Tensor offsets = new_empty(x, {p.encoder.N + 1}, ScalarType::Long);
    const Tensor least = new_empty(x, {}, ScalarType::Float);
    const Tensor aux_values = p.values(aux_mask ? k_aux : 0);
    const Tensor aux_indices = p.indices(aux_mask ? k_aux : 0);
    const BatchTopK call{p.encoder,
                         total,
                         floats(values),
                         ints(indices),
                         longs(offsets),
                         floats(least),
                         p.aux(aux_mask, k_aux, aux_values, aux_indices)};
    p.engine.run(p.op, x, call);
    return {values, indices, offsets, least, aux_values, aux_indices};
  }

  static BatchLists threshold(const Tensor& x, const Tensor& weight, const Maybe& bias,
                              const Maybe& scale, const Tensor& limit, const Maybe& aux_mask,
                              bool inclusive, int64_t capacity, int64_t k_aux) {
    Prepared p("sae_threshold", x, weight, bias, scale);
    const bool padded = capacity >= 0;
    if (padded) p.check_count("capacity", capacity, 1, p.encoder.F);
    const Tensor limits = float_values(p.op, "limit", limit, p.encoder.F);
    Tensor values = p.values(padded ? capacity : 0), indices = p.indices(padded ? capacity : 0);
    const Tensor offsets = new_empty(x, {padded ? 0 : p.encoder.N + 1}, ScalarType::Long);
    const Tensor counts = new_empty(x, {p.encoder.N}, ScalarType::Long);
    const Tensor aux_values = p.values(aux_mask ? k_aux : 0);
    const Tensor aux_indices = p.indices(aux_mask ? k_aux : 0);
    Threshold call{};
    call.encoder = p.encoder;
    call.limit = floats(limits);
    call.inclusive = inclusive;
    call.counts = longs(counts);
    call.capacity = padded ? capacity : -1;
    call.aux = p.aux(aux_mask, k_aux, aux_values, aux_indices);
    if (padded) {
      call.values = floats(values);
      call.indices = ints(indices);
      p.engine.run(p.op, x, call);
    } else {
      call.offsets = longs(offsets);
      p.engine.run(p.op, x, call, [&](int64_t nnz) {
        values = new_empty(x, {nnz}, ScalarType::Float);
        indices = new_empty(x, {nnz}, ScalarType::Int);
        return Entries{floats(values), ints(indices)};
      });
    }
    return {values, indices, offsets, counts, aux_values, aux_indices};
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("sae_topk", TORCH_BOX(&EncodeBinding::topk));
    m.impl("sae_group_max", TORCH_BOX(&EncodeBinding::group_max));
    m.impl("sae_batch_topk", TORCH_BOX(&EncodeBinding::batch_topk));
    m.impl("sae_threshold", TORCH_BOX(&EncodeBinding::threshold));
  }
};

}  // namespace gemma_ext::sae
