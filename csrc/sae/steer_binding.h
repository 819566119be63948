// SPDX-License-Identifier: Apache-2.0
// Steering between tensors and an engine, that of products_binding.h: checks, memory of the results, the call.
#pragma once

#include "products_binding.h"
#include "steer.h"

namespace gemma_ext::sae {

template <class Engine>
struct SteerBinding {
  static constexpr const char* kOp = "sae_steer";

  static Tensor exact(const char* name, const Tensor& t, ScalarType type,
                      std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(Engine::here(t), kOp, ": expected ", name, " on the device of x");
    bool fits = t.scalar_type() == type && t.dim() == int64_t(shape.size());
    int64_t d = 0;
    for (const int64_t size : shape) {
      fits = fits && (size < 0 || t.size(d) == size);
      ++d;
    }
    STD_TORCH_CHECK(fits, kOp, ": expected another shape or dtype of ", name);
    return torch::stable::contiguous(t);
  }

  static Tensor rows(const char* name, const Tensor& t, int64_t count, int64_t width) {
    STD_TORCH_CHECK(Engine::here(t), kOp, ": expected ", name, " on the device of x");
    storage_type(kOp, name, t);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == count && t.size(1) == width, kOp, ": expected ",
                    name, " to be [", count, ", ", width, "]");
    return Engine::matrix(kOp, name, t.stride(1) == 1 ? t : torch::stable::contiguous(t));
  }

  template <class T>
  static const T* at(const Tensor& t) {
    return static_cast<const T*>(t.data_ptr());
  }

  static std::tuple<Tensor, Tensor> steer(const Tensor& x, const Tensor& decoder,
                                          const Tensor& encoder, const Tensor& tables,
                                          const Tensor& offsets, const Tensor& latents,
                                          const Tensor& modes, const Tensor& amounts,
                                          const Tensor& gates, const Tensor& state,
                                          const Maybe& reads, const Maybe& writes) {
    Engine engine(kOp, x);
    STD_TORCH_CHECK(x.dim() == 3, kOp, ": expected x to be [B, T, D]");
    Steer call{};
    call.type = storage_type(kOp, "x", x);
    call.B = x.size(0);
    call.T = x.size(1);
    call.D = x.size(2);
    STD_TORCH_CHECK(decoder.dim() == 2, kOp, ": expected decoder to be [R, D]");
    call.R = decoder.size(0);
    call.entries = latents.numel();
    STD_TORCH_CHECK(call.R <= INT32_MAX && call.entries <= INT32_MAX, kOp,
                    ": expected fewer than 2^31 directions");
    const bool reads_code = encoder.numel() > 0 || call.D == 0;
    const Tensor given = torch::stable::contiguous(x);
    const Tensor directions = rows("decoder", decoder, call.R, call.D);
    const Tensor detectors = reads_code ? rows("encoder", encoder, call.R, call.D) : directions;
    const Tensor numbers = exact("tables", tables, ScalarType::Float, {call.R, 3});
    const Tensor starts = exact("offsets", offsets, ScalarType::Long, {call.B + 1});
    const Tensor entries = exact("latents", latents, ScalarType::Int, {call.entries});
    const Tensor kinds = exact("modes", modes, ScalarType::Int, {call.entries});
    const Tensor strengths = exact("amounts", amounts, ScalarType::Float, {call.entries, 3});
    const Tensor doors = exact("gates", gates, ScalarType::Int, {call.B, 2});
    const Tensor before = exact("state", state, ScalarType::Int, {call.B});
    Maybe readable, writable;
    if (reads) readable = exact("reads", *reads, ScalarType::Bool, {call.B, call.T});
    if (writes) writable = exact("writes", *writes, ScalarType::Bool, {call.B, call.T});
    Tensor out = new_empty(given, {call.B, call.T, call.D});
    Tensor after = new_empty(before, {call.B});
    call.x = given.data_ptr();
    call.decoder = {directions.data_ptr(), directions.stride(0),
                    storage_type(kOp, "decoder", decoder)};
    if (reads_code)
      call.encoder = {detectors.data_ptr(), detectors.stride(0),
                      storage_type(kOp, "encoder", encoder)};
    call.tables = at<float>(numbers);
    call.offsets = at<int64_t>(starts);
    call.latents = at<int32_t>(entries);
    call.modes = at<int32_t>(kinds);
    call.amounts = at<float>(strengths);
    call.gates = at<int32_t>(doors);
    call.state = at<int32_t>(before);
    call.reads = readable ? at<uint8_t>(*readable) : nullptr;
    call.writes = writable ? at<uint8_t>(*writable) : nullptr;
    call.out = out.mutable_data_ptr();
    call.state_after = static_cast<int32_t*>(after.mutable_data_ptr());
    engine.check(kOp, call);
    engine.run(kOp, out, call);
    return {out, after};
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("sae_steer", TORCH_BOX(&SteerBinding::steer));
  }
};

}  // namespace gemma_ext::sae
