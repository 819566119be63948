// SPDX-License-Identifier: Apache-2.0
// Sparse dictionaries: the CUDA engine of the ops that ops.cpp declares. Nothing here waits for the device but for
// the length of a list, where a call asks for one.
#include "common/torch/cuda.h"
#include "sae/cuda/engine.h"
#include "sae/steer_binding.h"

namespace gemma_ext::sae {
namespace {

struct Products {
  OnDevice device;

  Products(const char*, const Tensor& like) : device(like) {}

  static bool here(const Tensor& t) { return on_device(t); }
  static Tensor matrix(const char*, const char*, const Tensor& t) { return t; }
  template <class Call>
  static void check(const char*, const Call&) {}

  static void check_levels(const char* op, const Nested& call) {
    STD_TORCH_CHECK(!call.widths || call.levels <= cuda::kMostWidths, op, ": expected at most ",
                    cuda::kMostWidths, " widths on a card, got ", call.levels);
  }

  // The workspace lives until the stream has passed it.
  template <class Call, class... Memory>
  void run(const char* op, const Tensor& like, const Call& call, const Memory&... memory) {
    if constexpr (std::is_same_v<Call, DecodeBackward>)
      STD_TORCH_CHECK(call.grad.type == call.weight.type, op,
                      ": expected grad in the dtype of weight");
    if constexpr (std::is_same_v<Call, Nested>) check_levels(op, call);
    if constexpr (std::is_same_v<Call, NestedBackward>) check_levels(op, call.nested);
    Tensor workspace = new_empty(like, {cuda::workspace(call)}, ScalarType::Byte);
    const cuda::Status status =
        cuda::run(call, workspace.mutable_data_ptr(), device.stream, memory...);
    STD_TORCH_CHECK(status == 0, op, ": ", cuda::status_text(status));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gemma_ext, GEMMA_EXT_DEVICE_KEY, m) {
  ProductsBinding<Products>::register_in(m);
  SteerBinding<Products>::register_in(m);
}

}  // namespace gemma_ext::sae
