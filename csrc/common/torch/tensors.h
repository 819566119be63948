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

inline Tensor float_vector(const Tensor& like, int64_t n, bool zero = true) {
  Tensor t = torch::stable::new_empty(like, {n}, ScalarType::Float);
  return zero ? torch::stable::fill_(t, 0) : t;
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// [n] values of any of our storage types, strided, as float32.
inline std::vector<float> to_floats(const char* op, const char* name, const Tensor& t) {
  const DType type = storage_type(op, name, t);
  const int64_t n = t.numel(), step = t.stride(0);
  std::vector<float> out(n);
  for (int64_t i = 0; i < n; ++i) {
    if (type == DType::kFloat32)
      out[i] = static_cast<const float*>(t.data_ptr())[i * step];
    else if (type == DType::kBFloat16)
      out[i] = bf16_to_float(static_cast<const uint16_t*>(t.data_ptr())[i * step]);
    else
      out[i] = half_to_float(static_cast<const uint16_t*>(t.data_ptr())[i * step]);
  }
  return out;
}

}  // namespace gemma_ext
