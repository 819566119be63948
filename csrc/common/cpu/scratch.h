// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stddef.h>

namespace gemma_ext::cpu {

// One worker's memory; grows to what its tasks need. Kernels of every instruction set call it, so
// nothing here is inline.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // At least `bytes` at a multiple of 64; what the part held is lost when it grows.
  void* part(int index, size_t bytes) noexcept;

 private:
  static constexpr int kParts = 10;
  void* parts_[kParts] = {};
  size_t sizes_[kParts] = {};
};

}  // namespace gemma_ext::cpu
