// SPDX-License-Identifier: Apache-2.0
// Sparse dictionaries: the CUDA engine of the ops that ops.cpp declares. Nothing here waits for the device but for
// the length of a list, where a call asks for one.
#include "common/torch/cuda.h"
#include "sae/cuda/engine.h"
#include "sae/encode_binding.h"
#include "sae/steer_binding.h"

namespace gemma_ext::sae {
namespace {

struct Card {
  OnDevice device;

  Card(const char*, const Tensor& like) : device(like) {}

  static bool here(const Tensor& t) { return on_device(t); }

  // The workspace lives until the stream has passed it.
  template <class Call, class... Memory>
  void run(const char* op, const Tensor& like, const Call& call, const Memory&... memory) {
    Tensor workspace = new_empty(like, {cuda::workspace(call)}, ScalarType::Byte);
    const cuda::Status status =
        cuda::run(call, workspace.mutable_data_ptr(), device.stream, memory...);
    STD_TORCH_CHECK(status == 0, op, ": ", cuda::status_text(status));
  }
};

struct Encoders : Card {
  using Card::Card;

  // Rows of whole 16-byte words at multiples of 16 bytes, one behind the other as TMA wants them.
  static Tensor matrix(const char* op, const char* name, const Tensor& t) {
    const int64_t word = 16 / size_of(storage_type(op, name, t)), width = t.size(1);
    const bool fits = t.stride(1) == 1 && t.stride(0) % word == 0 && width % word == 0 &&
                      t.stride(0) >= width && t.stride(0) <= INT32_MAX &&
                      reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
    if (fits) return t;
    const int64_t padded_width = (width + word - 1) / word * word;
    Tensor padded = torch::stable::new_zeros(t, {t.size(0), padded_width});
    Tensor inside = torch::stable::narrow(padded, 1, 0, width);
    torch::stable::copy_(inside, t);
    return padded;
  }

  template <class Call>
  void run(const char* op, const Tensor& like, const Call& call) {
    Card::run(op, like, call);
  }
  void run(const char* op, const Tensor& like, const Threshold& call, const Allocate& allocate) {
    Tensor more = new_empty(like, {0}, ScalarType::Byte);
    Card::run(
        op, like, call,
        [&](int64_t nnz) {
          STD_TORCH_CHECK(nnz <= INT32_MAX, op, ": expected fewer than 2^31 entries, got ", nnz);
          return allocate(nnz);
        },
        [&](int64_t bytes) {
          more = new_empty(like, {bytes}, ScalarType::Byte);
          return more.mutable_data_ptr();
        });
  }
};

struct Products : Card {
  using Card::Card;

  static Tensor matrix(const char*, const char*, const Tensor& t) { return t; }
  template <class Call>
  static void check(const char*, const Call&) {}

  static void check_levels(const char* op, const Nested& call) {
    STD_TORCH_CHECK(!call.widths || call.levels <= cuda::kMostWidths, op, ": expected at most ",
                    cuda::kMostWidths, " widths on a card, got ", call.levels);
  }

  template <class Call, class... Memory>
  void run(const char* op, const Tensor& like, const Call& call, const Memory&... memory) {
    if constexpr (std::is_same_v<Call, DecodeBackward>)
      STD_TORCH_CHECK(call.grad.type == call.weight.type || call.grad.type == DType::kFloat32, op,
                      ": expected grad in float32 or the dtype of weight");
    if constexpr (std::is_same_v<Call, Nested>) check_levels(op, call);
    if constexpr (std::is_same_v<Call, NestedBackward>) check_levels(op, call.nested);
    Card::run(op, like, call, memory...);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gemma_ext, GEMMA_EXT_DEVICE_KEY, m) {
  EncodeBinding<Encoders>::register_in(m);
  ProductsBinding<Products>::register_in(m);
  SteerBinding<Products>::register_in(m);
}

}  // namespace gemma_ext::sae
