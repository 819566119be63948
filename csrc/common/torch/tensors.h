// SPDX-License-Identifier: Apache-2.0
// Small views of stable tensors for the op bindings.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "common/dtype.h"

namespace gemma_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType storage_type(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": expected ", name, " to be float32, bfloat16 or float16");
  return DType::kFloat32;
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

}  // namespace gemma_ext
