// SPDX-License-Identifier: Apache-2.0
// Depth batching: the CUDA engine of the ops that ops.cpp declares. Nothing here waits for the device.
#include "common/torch/cuda.h"
#include "depth_batching/cuda/engine.h"
#include "depth_batching/cuda/head_engine.h"
#include "depth_batching/cuda/linear_engine.h"
#include "depth_batching/cuda/propagate_engine.h"
#include "depth_batching/head_binding.h"
#include "depth_batching/kv_binding.h"
#include "depth_batching/linear_binding.h"
#include "depth_batching/propagate_binding.h"
#include "depth_batching/shortlist_binding.h"

namespace gemma_ext::depth_batching {
namespace {

struct Card {
  OnDevice device;

  Card(const char*, const Tensor& like) : device(like) {}

  static bool here(const Tensor& t) { return on_device(t); }

  // Rows of whole 16-byte words at multiples of 16 bytes.
  static Tensor matrix(const char* op, const char* name, const Tensor& t) {
    const int64_t size =
        t.scalar_type() == ScalarType::Char ? 1 : size_of(storage_type(op, name, t));
    const int64_t word = 16 / size, last = t.dim() - 1;
    bool fits = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && t.size(last) % word == 0;
    for (int64_t d = 0; d < last; ++d) fits = fits && t.stride(d) % word == 0;
    if (fits) return t;
    std::vector<int64_t> shape;
    for (int64_t d = 0; d < last; ++d) shape.push_back(t.size(d));
    shape.push_back((t.size(last) + word - 1) / word * word);
    Tensor padded = torch::stable::new_zeros(t, shape);
    Tensor inside = torch::stable::narrow(padded, last, 0, t.size(last));
    torch::stable::copy_(inside, t);
    return padded;
  }

  // The workspace lives until the stream has passed it.
  template <class Call>
  void run(const char* op, const Tensor& like, const Call& call) {
    Tensor workspace = torch::stable::new_empty(like, {cuda::workspace(call)}, ScalarType::Byte);
    const cuda::Status status = cuda::run(call, workspace.mutable_data_ptr(), device.stream);
    STD_TORCH_CHECK(status == 0, op, ": ", cuda::status_text(status));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gemma_ext, GEMMA_EXT_DEVICE_KEY, m) {
  KvBinding<Card>::register_in(m);
  LinearBinding<Card>::register_in(m);
  HeadBinding<Card>::register_in(m);
  ShortlistBinding<Card>::register_in(m);
  PropagateBinding<Card>::register_in(m);
}

}  // namespace gemma_ext::depth_batching
