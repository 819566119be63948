// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdlib.h>
#include <string.h>

#include <new>
#include <utility>

#include "linear_table.h"

namespace gemma_ext::depth_batching::cpu {

// Memory of rows as products take them, zero.
class PackedRows {
 public:
  PackedRows(int64_t rows, int64_t width, int64_t element) : width_(padded_width(width)) {
    const size_t bytes = (rows * width_ * element + 63) / 64 * 64;
    if (!bytes) return;
    at_ = aligned_alloc(64, bytes);
    if (!at_) throw std::bad_alloc();
    memset(at_, 0, bytes);
  }
  PackedRows(PackedRows&& other) noexcept
      : at_(std::exchange(other.at_, nullptr)), width_(other.width_) {}
  ~PackedRows() { free(at_); }

  Packed rows() const { return {at_, width_}; }

 private:
  void* at_ = nullptr;
  int64_t width_;
};

}  // namespace gemma_ext::depth_batching::cpu
