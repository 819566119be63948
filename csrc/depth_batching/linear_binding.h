// SPDX-License-Identifier: Apache-2.0
// Norms and linear layers between tensors and an engine: checks, memory of the results, the calls.
//
// An engine is that of kv_binding.h, and has
//   matrix(op, name, t)    t [..., columns] with rows that it takes, a padded copy if need be
#pragma once

#include <tuple>

#include "common/torch/tensors.h"
#include "linear.h"

namespace gemma_ext::depth_batching {

template <class Engine>
struct LinearBinding {
  using Maybe = std::optional<Tensor>;
  using Tensors = std::vector<Tensor>;

  static void check(const char* op, const char* name, const Tensor& t, int64_t rows,
                    int64_t width) {
    STD_TORCH_CHECK(Engine::here(t), op, ": expected ", name,
                    " on the device of the other tensors");
    STD_TORCH_CHECK(t.dim() == 2 && (rows < 0 || t.size(0) == rows) && t.size(1) == width, op,
                    ": expected another shape of ", name);
  }

  // Rows of contiguous elements.
  static Tensor rows(const char* op, const char* name, const Tensor& t, int64_t count,
                     int64_t width) {
    check(op, name, t, count, width);
    return Engine::matrix(op, name,
                          t.stride(1) == 1 || width < 2 ? t : torch::stable::contiguous(t));
  }

  static Tensor vector(const char* op, const char* name, const Tensor& t, int64_t count) {
    STD_TORCH_CHECK(Engine::here(t), op, ": expected ", name,
                    " on the device of the other tensors");
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == count, op, ": expected ", name, " to be [", count,
                    "]");
    return torch::stable::contiguous(t);
  }

  static Tensor indices(const char* op, const char* name, const Tensor& t, int64_t count) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int, op, ": expected ", name, " to be int32");
    return vector(op, name, t, count < 0 ? t.numel() : count);
  }

  static void* at(Tensor& t) { return t.mutable_data_ptr(); }
  static const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.data_ptr()); }

  static Tensor gather(const Tensor& bank, const Tensor& slots, const Tensor& weight, double eps,
                       bool plus_one) {
    const char* op = "depth_gather_rms_norm";
    Engine engine(op, bank);
    STD_TORCH_CHECK(bank.dim() == 2, op, ": expected bank to be [S, D]");
    const Tensor whole = torch::stable::contiguous(bank);
    const Tensor at_slots = indices(op, "slots", slots, -1);
    const Tensor scale = vector(op, "weight", weight, bank.size(1));
    Gather call{};
    call.bank = whole.data_ptr();
    call.bank_type = storage_type(op, "bank", bank);
    call.S = bank.size(0);
    call.D = bank.size(1);
    call.n = at_slots.numel();
    call.slots = ints(at_slots);
    call.weight = scale.data_ptr();
    call.type = call.out_type = storage_type(op, "weight", weight);
    call.norm = {float(eps), plus_one};
    Tensor out = torch::stable::new_empty(weight, {call.n, call.D});
    call.out = at(out);
    engine.run(op, out, call);
    return out;
  }

  static Tensor scatter(const Tensor& bank, const Tensor& slots, const Tensor& y,
                        const Maybe& weight, const Maybe& next_weight, double eps, bool plus_one) {
    const char* op = "depth_scatter_rms_norm";
    Engine engine(op, bank);
    STD_TORCH_CHECK(bank.dim() == 2 && bank.is_contiguous(), op,
                    ": expected bank to be [S, D], contiguous");
    const Tensor at_slots = indices(op, "slots", slots, -1);
    const Tensor given = rows(op, "y", y, at_slots.numel(), bank.size(1));
    Tensor target = bank;
    Scatter call{};
    call.bank = at(target);
    call.bank_type = storage_type(op, "bank", bank);
    call.S = bank.size(0);
    call.D = bank.size(1);
    call.n = at_slots.numel();
    call.slots = ints(at_slots);
    call.y = given.data_ptr();
    call.y_stride = given.stride(0);
    call.y_type = storage_type(op, "y", y);
    Maybe own, next;
    if (weight) {
      own = vector(op, "weight", *weight, call.D);
      call.weight = own->data_ptr();
      call.weight_type = storage_type(op, "weight", *weight);
    }
    if (next_weight) {
      next = vector(op, "next_weight", *next_weight, call.D);
      call.next_weight = next->data_ptr();
      call.next_type = storage_type(op, "next_weight", *next_weight);
    }
    call.norm = {float(eps), plus_one};
    Tensor out = torch::stable::new_empty(next ? *next : bank, {next ? call.n : 0, call.D});
    call.next = at(out);
    engine.run(op, out, call);
    return out;
  }

  // Of x [n, D]; what its pointers lead to stays in `kept`. loops 0: no adapter is expected.
  static Projection projection(const char* op, const Tensor& weight, const Tensor& bias,
                               const Tensor& a, const Tensor& b, int64_t D, int64_t loops,
                               DType type, Tensors& kept) {
    const auto keep = [&](Tensor t) -> const Tensor& {
      STD_TORCH_CHECK(storage_type(op, "a projection", t) == type, op,
                      ": expected projections in the dtype of x");
      kept.push_back(t);
      return kept.back();
    };
    Projection to{};
    const Tensor& w = keep(rows(op, "a weight", weight, -1, D));
    to.weight = w.data_ptr();
    to.features = w.size(0);
    to.stride = w.stride(0);
    if (bias.numel() > 0) to.bias = keep(vector(op, "a bias", bias, to.features)).data_ptr();
    if (a.numel() == 0) return to;
    STD_TORCH_CHECK(loops > 0, op, ": expected seg_offsets with adapters");
    STD_TORCH_CHECK(Engine::here(a) && Engine::here(b), op,
                    ": expected a and b on the device of x");
    to.rank = a.dim() == 3 ? a.size(1) : -1;
    STD_TORCH_CHECK(to.rank >= 0 && a.size(0) == loops && a.size(2) == D && b.dim() == 3 &&
                        b.size(0) == loops && b.size(1) == to.features && b.size(2) == to.rank,
                    op, ": expected a [B, r, D] and b [B, F, r] of the B loops");
    const auto adapter = [&](const char* name, const Tensor& t, int64_t& stride) {
      const Tensor& whole = keep(Engine::matrix(op, name, torch::stable::contiguous(t)));
      stride = whole.size(2);
      return whole.data_ptr();
    };
    to.a = adapter("a", a, to.a_stride);
    to.b = adapter("b", b, to.b_stride);
    return to;
  }

  static Tensor linear(const Tensor& x, const Tensors& weights, const Tensors& biases,
                       const Tensors& a, const Tensors& b, const Maybe& seg_offsets, double scale,
                       int64_t activation) {
    const char* op = "depth_linear";
    Engine engine(op, x);
    STD_TORCH_CHECK(x.dim() == 2, op, ": expected x to be [n, D]");
    const size_t count = weights.size();
    STD_TORCH_CHECK(count >= 1 && count <= kMostProjections && biases.size() == count &&
                        a.size() == count && b.size() == count,
                    op, ": expected 1 to ", kMostProjections,
                    " weights, with as many biases, a and b (empty where absent)");
    STD_TORCH_CHECK(
        activation >= kNone && activation <= kSilu &&
            (activation == kNone || (count == 2 && weights[0].size(0) == weights[1].size(0))),
        op, ": expected two weights of one height with an activation");
    Linear call{};
    call.type = storage_type(op, "x", x);
    call.n = x.size(0);
    call.D = x.size(1);
    call.count = int(count);
    call.scale = float(scale);
    call.activation = Activation(activation);
    const Tensor given = rows(op, "x", x, -1, call.D);
    call.x = given.data_ptr();
    call.x_stride = given.stride(0);
    Maybe offsets;
    if (seg_offsets) {
      offsets = indices(op, "seg_offsets", *seg_offsets, -1);
      call.loops = offsets->numel() - 1;
      call.seg_offsets = ints(*offsets);
    }
    Tensors kept;
    for (size_t p = 0; p < count; ++p)
      call.projections[p] =
          projection(op, weights[p], biases[p], a[p], b[p], call.D, call.loops, call.type, kept);
    call.y_width = width_of(call);
    Tensor y = torch::stable::new_empty(x, {call.n, call.y_width});
    call.y = at(y);
    engine.run(op, y, call);
    return y;
  }

  template <class Library>
  static void define_in(Library& m) {
    m.def(
        "depth_gather_rms_norm(Tensor bank, Tensor slots, Tensor weight, float eps, "
        "bool plus_one) -> Tensor");
    m.def(
        "depth_scatter_rms_norm(Tensor(a!) bank, Tensor slots, Tensor y, Tensor? weight, "
        "Tensor? next_weight, float eps, bool plus_one) -> Tensor");
    // biases, a, b: one for each weight, empty where it has none
    m.def(
        "depth_linear(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] a, Tensor[] b, "
        "Tensor? seg_offsets, float scale, int activation) -> Tensor");
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("depth_gather_rms_norm", TORCH_BOX(&LinearBinding::gather));
    m.impl("depth_scatter_rms_norm", TORCH_BOX(&LinearBinding::scatter));
    m.impl("depth_linear", TORCH_BOX(&LinearBinding::linear));
  }
};

}  // namespace gemma_ext::depth_batching
