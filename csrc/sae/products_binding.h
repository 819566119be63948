// SPDX-License-Identifier: Apache-2.0
// Products of sparse codes between tensors and an engine: checks, memory of the results, the calls, for both engines.
//
// An engine is that of encode_binding.h, and has
//   check(op, list)                  refuses wrong indices where it can look at them without waiting
//   run(op, like, call, allocate)    DecodeBackward into the rows that are needed
#pragma once

#include <functional>
#include <tuple>

#include "common/torch/tensors.h"
#include "lists.h"

namespace gemma_ext::sae {

using torch::stable::new_empty;
using Maybe = std::optional<Tensor>;

using AllocateRows = std::function<TouchedRows(int64_t touched)>;

struct ListTensors {
  const Tensor &values, &indices;
  const Maybe &offsets, &counts;
};

template <class Engine>
struct ProductsBinding {
  static Tensor contiguous(const char* op, const char* name, const Tensor& t, ScalarType type,
                           const char* type_name) {
    STD_TORCH_CHECK(Engine::here(t), op, ": expected ", name, " on the device of the codes");
    STD_TORCH_CHECK(t.scalar_type() == type, op, ": expected ", name, " to be ", type_name);
    return torch::stable::contiguous(t);
  }

  // The lists and the tensors that their pointers lead to.
  struct Lists {
    const char* op;
    Engine engine;
    Tensor values, indices;
    Maybe offsets, counts;
    std::vector<Tensor> kept;
    List list{};

    Lists(const char* op, const ListTensors& t, int64_t features)
        : op(op),
          engine(op, t.values),
          values(contiguous(op, "values", t.values, ScalarType::Float, "float32")),
          indices(contiguous(op, "indices", t.indices, ScalarType::Int, "int32")) {
      const int64_t dims = t.offsets ? 1 : 2;
      STD_TORCH_CHECK(values.dim() == dims && indices.dim() == dims, op,
                      ": expected values and indices to have ", dims, " dimensions");
      for (int64_t d = 0; d < dims; ++d)
        STD_TORCH_CHECK(values.size(d) == indices.size(d), op,
                        ": expected values and indices of one shape");
      STD_TORCH_CHECK(!(t.offsets && t.counts), op, ": expected offsets or counts, got both");
      list.entries = values.numel();
      list.F = features;
      if (t.offsets) {
        offsets = contiguous(op, "offsets", *t.offsets, ScalarType::Long, "int64");
        STD_TORCH_CHECK(offsets->dim() == 1 && offsets->size(0) >= 1, op,
                        ": expected offsets to be [N + 1]");
        list.offsets = static_cast<const int64_t*>(offsets->data_ptr());
        list.N = offsets->size(0) - 1;
      } else {
        list.N = values.size(0);
        list.K = values.size(1);
      }
      if (t.counts) {
        counts = contiguous(op, "counts", *t.counts, ScalarType::Long, "int64");
        STD_TORCH_CHECK(counts->dim() == 1 && counts->size(0) == list.N, op,
                        ": expected counts to be [", list.N, "]");
        list.counts = static_cast<const int64_t*>(counts->data_ptr());
      }
      STD_TORCH_CHECK(list.entries <= INT32_MAX && list.N < INT32_MAX && features <= INT32_MAX, op,
                      ": expected fewer than 2^31 entries, tokens and features");
      list.values = floats(values);
      list.indices = static_cast<const int32_t*>(indices.data_ptr());
      engine.check(op, list);
    }

    // [rows, width] with elements of a row one behind the other; any number where it is negative.
    Table table(const char* name, const Tensor& t, int64_t rows, int64_t width) {
      STD_TORCH_CHECK(Engine::here(t), op, ": expected ", name, " on the device of the codes");
      STD_TORCH_CHECK(
          t.dim() == 2 && (rows < 0 || t.size(0) == rows) && (width < 0 || t.size(1) == width), op,
          ": expected ", name, " to have ", rows < 0 ? list.F : rows,
          " rows of the width of the others");
      const DType type = storage_type(op, name, t);
      kept.push_back(Engine::matrix(op, name, t.stride(1) == 1 ? t : torch::stable::contiguous(t)));
      return {kept.back().data_ptr(), kept.back().stride(0), type};
    }

    const float* vector(const char* name, const Maybe& t, int64_t n) {
      if (!t) return nullptr;
      STD_TORCH_CHECK(Engine::here(*t), op, ": expected ", name, " on the device of the codes");
      STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == n, op, ": expected ", name, " to be [", n,
                      "]");
      kept.push_back(torch::stable::contiguous(torch::stable::to(*t, ScalarType::Float)));
      return floats(kept.back());
    }

    Tensor made(std::initializer_list<int64_t> shape, ScalarType type) const {
      return new_empty(values, shape, type);
    }
    // A gradient of the shape of the values, or an empty one.
    Tensor value_gradients(bool wanted) const {
      if (!wanted) return made({0}, ScalarType::Float);
      return list.offsets ? made({list.entries}, ScalarType::Float)
                          : made({list.N, list.K}, ScalarType::Float);
    }
  };

  static int64_t features_of(const Tensor& weight) { return weight.dim() ? weight.size(0) : 0; }
  static int64_t width_of(const Tensor& t) { return t.dim() == 2 ? t.size(1) : -1; }

  static std::tuple<Tensor, Tensor> decoded(const char* op, const ListTensors& given,
                                            const Tensor& weight, const Maybe& bias,
                                            const Maybe& target) {
    Lists l(op, given, features_of(weight));
    Decode call{};
    call.D = width_of(weight);
    call.list = l.list;
    call.weight = l.table("weight", weight, l.list.F, call.D);
    call.bias = l.vector("bias", bias, call.D);
    if (target) call.target = l.table("target", *target, l.list.N, call.D);
    Tensor out = l.made({l.list.N, call.D}, weight.scalar_type());
    Tensor squared = l.made({target ? l.list.N : 0}, ScalarType::Float);
    call.out = out.mutable_data_ptr();
    call.squared = target ? floats(squared) : nullptr;
    l.engine.run(op, out, call);
    return {out, squared};
  }

  static Tensor decode(const Tensor& values, const Tensor& indices, const Maybe& offsets,
                       const Maybe& counts, const Tensor& weight, const Maybe& bias) {
    return std::get<0>(decoded("sae_decode", {values, indices, offsets, counts}, weight, bias, {}));
  }

  static std::tuple<Tensor, Tensor> decode_error(const Tensor& values, const Tensor& indices,
                                                 const Maybe& offsets, const Maybe& counts,
                                                 const Tensor& weight, const Maybe& bias,
                                                 const Tensor& target) {
    return decoded("sae_decode_error", {values, indices, offsets, counts}, weight, bias, target);
  }

  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static Gradients decode_backward(const Tensor& values, const Tensor& indices,
                                   const Maybe& offsets, const Maybe& counts, const Tensor& weight,
                                   const Tensor& grad, const Maybe& scale, bool unit_norm,
                                   bool rows_only, bool need_values, bool need_weight,
                                   bool need_bias) {
    const char* op = "sae_decode_backward";
    Lists l(op, {values, indices, offsets, counts}, features_of(weight));
    DecodeBackward call{};
    call.D = width_of(weight);
    call.list = l.list;
    call.weight = l.table("weight", weight, l.list.F, call.D);
    call.grad = l.table("grad", grad, l.list.N, call.D);
    call.scale = l.vector("scale", scale, l.list.N);
    call.unit_norm = unit_norm;
    call.rows_only = rows_only;
    call.want_weight = need_weight;
    const bool dense = need_weight && !rows_only;
    const ScalarType type = weight.scalar_type();
    Tensor d_values = l.value_gradients(need_values);
    Tensor d_weight = l.made({dense ? l.list.F : 0, dense ? call.D : 0}, type);
    Tensor d_bias = l.made({need_bias ? call.D : 0}, ScalarType::Float);
    Tensor touched = l.made({0}, ScalarType::Long);
    call.d_values = need_values ? floats(d_values) : nullptr;
    call.d_weight = dense ? d_weight.mutable_data_ptr() : nullptr;
    call.d_bias = need_bias ? floats(d_bias) : nullptr;
    if (need_weight && rows_only) {
      l.engine.run(op, values, call, [&](int64_t count) {
        touched = l.made({count}, ScalarType::Long);
        d_weight = l.made({count, call.D}, type);
        return TouchedRows{static_cast<int64_t*>(touched.mutable_data_ptr()),
                           d_weight.mutable_data_ptr()};
      });
    } else {
      l.engine.run(op, values, call);
    }
    return {d_values, d_weight, d_bias, touched};
  }

  static std::tuple<Tensor, Tensor> scatter(const Tensor& values, const Tensor& indices,
                                            const Maybe& offsets, const Maybe& counts,
                                            const Tensor& rows, int64_t features) {
    const char* op = "sae_scatter";
    STD_TORCH_CHECK(features >= 0, op, ": expected features to be 0 or more, got ", features);
    Lists l(op, {values, indices, offsets, counts}, features);
    Scatter call{};
    call.D = width_of(rows);
    call.list = l.list;
    call.rows = l.table("rows", rows, l.list.N, call.D);
    Tensor sums = l.made({features, call.D}, ScalarType::Float);
    Tensor totals = l.made({features}, ScalarType::Float);
    call.sums = floats(sums);
    call.totals = floats(totals);
    l.engine.run(op, values, call);
    return {sums, totals};
  }

  static Nested nested_call(Lists& l, const Tensor& weight, const Maybe& bias, const Tensor& target,
                            const std::vector<int64_t>& widths) {
    Nested call{};
    call.D = width_of(weight);
    call.list = l.list;
    call.weight = l.table("weight", weight, l.list.F, call.D);
    call.bias = l.vector("bias", bias, call.D);
    call.target = l.table("target", target, l.list.N, call.D);
    call.levels = widths.empty() ? l.list.K : int64_t(widths.size());
    call.widths = widths.empty() ? nullptr : widths.data();
    STD_TORCH_CHECK(!widths.empty() || !l.list.offsets, l.op, ": expected widths with offsets");
    for (size_t m = 0; m < widths.size(); ++m)
      STD_TORCH_CHECK(widths[m] > (m ? widths[m - 1] : 0) && widths[m] <= l.list.F, l.op,
                      ": expected widths to ascend from above 0 to ", l.list.F, " at most");
    return call;
  }

  static Tensor nested(const Tensor& values, const Tensor& indices, const Maybe& offsets,
                       const Maybe& counts, const Tensor& weight, const Maybe& bias,
                       const Tensor& target, const std::vector<int64_t>& widths) {
    const char* op = "sae_nested";
    Lists l(op, {values, indices, offsets, counts}, features_of(weight));
    Nested call = nested_call(l, weight, bias, target, widths);
    Tensor squared = l.made({l.list.N, call.levels}, ScalarType::Float);
    call.squared = floats(squared);
    l.engine.run(op, values, call);
    return squared;
  }

  static Gradients nested_backward(const Tensor& values, const Tensor& indices,
                                   const Maybe& offsets, const Maybe& counts, const Tensor& weight,
                                   const Maybe& bias, const Tensor& target,
                                   const std::vector<int64_t>& widths, const Tensor& d_squared,
                                   bool unit_norm, bool need_values, bool need_weight,
                                   bool need_bias, bool need_target) {
    const char* op = "sae_nested_backward";
    Lists l(op, {values, indices, offsets, counts}, features_of(weight));
    NestedBackward call{};
    call.nested = nested_call(l, weight, bias, target, widths);
    const int64_t D = call.nested.D;
    const Tensor upstream = contiguous(op, "d_squared", d_squared, ScalarType::Float, "float32");
    STD_TORCH_CHECK(upstream.dim() == 2 && upstream.size(0) == l.list.N &&
                        upstream.size(1) == call.nested.levels,
                    op, ": expected d_squared to be [", l.list.N, ", ", call.nested.levels, "]");
    call.d_squared = floats(upstream);
    call.unit_norm = unit_norm;
    Tensor d_values = l.value_gradients(need_values);
    Tensor d_weight =
        l.made({need_weight ? l.list.F : 0, need_weight ? D : 0}, weight.scalar_type());
    Tensor d_bias = l.made({need_bias ? D : 0}, ScalarType::Float);
    Tensor d_target =
        l.made({need_target ? l.list.N : 0, need_target ? D : 0}, target.scalar_type());
    call.d_values = need_values ? floats(d_values) : nullptr;
    call.d_weight = need_weight ? d_weight.mutable_data_ptr() : nullptr;
    call.d_bias = need_bias ? floats(d_bias) : nullptr;
    call.d_target = need_target ? d_target.mutable_data_ptr() : nullptr;
    l.engine.run(op, values, call);
    return {d_values, d_weight, d_bias, d_target};
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("sae_decode", TORCH_BOX(&ProductsBinding::decode));
    m.impl("sae_decode_error", TORCH_BOX(&ProductsBinding::decode_error));
    m.impl("sae_decode_backward", TORCH_BOX(&ProductsBinding::decode_backward));
    m.impl("sae_scatter", TORCH_BOX(&ProductsBinding::scatter));
    m.impl("sae_nested", TORCH_BOX(&ProductsBinding::nested));
    m.impl("sae_nested_backward", TORCH_BOX(&ProductsBinding::nested_backward));
  }
};

}  // namespace gemma_ext::sae
