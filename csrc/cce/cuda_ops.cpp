// SPDX-License-Identifier: Apache-2.0
// Cut cross-entropy: the CUDA engine of the ops that ops.cpp declares. Nothing here waits for the device.
#include <stdlib.h>

#include "cce/cuda/engine.h"
#include "cce/divergence_binding.h"
#include "common/torch/cuda.h"

namespace gemma_ext::cce {
namespace {

// Memory for gradient strips: GEMMA_EXT_CCE_WORKSPACE_MB, 256 by default and 56 in the lean form.
int64_t strip_bytes(bool lean) {
  const char* asked = getenv("GEMMA_EXT_CCE_WORKSPACE_MB");
  if (!asked || !*asked) return lean ? cuda::kLeanStripBytes : cuda::kStripBytes;
  const int64_t megabytes = strtoll(asked, nullptr, 10);
  STD_TORCH_CHECK(megabytes > 0,
                  "expected GEMMA_EXT_CCE_WORKSPACE_MB to be a positive number, got ", asked);
  return megabytes << 20;
}

struct Cuda {
  static constexpr bool kLean = true, kOneDtype = true;
  OnDevice device;
  cuda::Memory memory;

  Cuda(const char*, const Tensor& e) : device(e) {}

  static bool here(const Tensor& t) { return on_device(t); }

  // Rows of whole 16-byte words at multiples of 16 bytes, one behind the other as TMA wants them.
  static Tensor matrix(const char* op, const char* name, const Tensor& t) {
    const int64_t word = 16 / size_of(storage_type(op, name, t)), width = t.size(1);
    const bool fits = t.stride(1) == 1 && t.stride(0) % word == 0 && width % word == 0 &&
                      t.stride(0) >= width && t.stride(0) <= INT32_MAX &&
                      reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
    if (fits) return t;
    Tensor padded = torch::stable::new_zeros(t, {t.size(0), ceil_div(width, word) * word});
    Tensor inside = torch::stable::narrow(padded, 1, 0, width);
    torch::stable::copy_(inside, t);
    return padded;
  }

  // The workspace lives until the stream has passed it.
  template <class Call>
  void run(const char* op, const Tensor& like, const Call& call) {
    if constexpr (requires { call.lean; }) memory.strip_bytes = strip_bytes(call.lean);
    if constexpr (requires { call.heads; }) memory.strip_bytes = strip_bytes(false);
    Tensor workspace = new_empty(like, {cuda::workspace(call, memory)}, ScalarType::Byte);
    memory.workspace = workspace.mutable_data_ptr();
    const cuda::Status status = cuda::run(call, memory, device.stream);
    STD_TORCH_CHECK(status == 0, op, ": ", cuda::status_text(status));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gemma_ext, GEMMA_EXT_DEVICE_KEY, m) {
  Binding<Cuda>::register_in(m);
  DivergenceBinding<Cuda>::register_in(m);
}

}  // namespace gemma_ext::cce
