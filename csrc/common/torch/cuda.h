// SPDX-License-Identifier: Apache-2.0
// Where a binding of device code runs. GEMMA_EXT_ON_HOST makes the same binding serve CPU tensors, for
// tests that execute the kernels without a GPU (common/simt/README.md).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "tensors.h"

#if !defined(GEMMA_EXT_ON_HOST)
// A torch without CUDA lacks this symbol and must still load the library.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace gemma_ext {

#if defined(GEMMA_EXT_ON_HOST)
#define GEMMA_EXT_DEVICE_KEY CPU
inline bool on_device(const Tensor& t) { return t.is_cpu(); }
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* stream = nullptr;
};
#else
#define GEMMA_EXT_DEVICE_KEY CUDA
inline bool on_device(const Tensor& t) { return t.is_cuda(); }

// The tensor's device is the current one for as long as this lives.
struct OnDevice {
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch is built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
#endif

}  // namespace gemma_ext
