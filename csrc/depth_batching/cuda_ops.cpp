// SPDX-License-Identifier: Apache-2.0
// Depth batching: the CUDA engine of the ops that ops.cpp declares. Nothing here waits for the device.
#include "common/torch/cuda.h"
#include "depth_batching/cuda/engine.h"
#include "depth_batching/kv_binding.h"

namespace gemma_ext::depth_batching {
namespace {

struct Card {
  OnDevice device;

  Card(const char*, const Tensor& like) : device(like) {}

  static bool here(const Tensor& t) { return on_device(t); }

  // The workspace lives until the stream has passed it.
  template <class Call>
  void run(const char* op, const Tensor& like, const Call& call) {
    Tensor workspace = torch::stable::new_empty(like, {cuda::workspace(call)}, ScalarType::Byte);
    const cuda::Status status = cuda::run(call, workspace.mutable_data_ptr(), device.stream);
    STD_TORCH_CHECK(status == 0, op, ": ", cuda::status_text(status));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gemma_ext, GEMMA_EXT_DEVICE_KEY, m) { KvBinding<Card>::register_in(m); }

}  // namespace gemma_ext::depth_batching
