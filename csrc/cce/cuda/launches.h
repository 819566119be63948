// SPDX-License-Identifier: Apache-2.0
// Host side of a call: a chain of launches, and temporary memory cut from one allocation.
#pragma once

#include "common/simt/simt.h"
#include "engine.h"

namespace gemma_ext::cce::cuda {

// Stops at the first launch that fails.
class Launches {
 public:
  explicit Launches(Stream stream) : stream_(static_cast<simt::Stream>(stream)) {}

  template <class Params>
  void add(void (*kernel)(Params), int64_t grid, int block, int shared_bytes,
           const std::type_identity_t<Params>& params) {
    if (status_ != simt::Status{} || grid == 0) return;
    status_ = simt::launch(kernel, static_cast<int>(grid), block, shared_bytes, stream_, params);
  }

  template <class Params>
  void add_clusters(void (*kernel)(Params), int64_t clusters, int size, int block, int shared_bytes,
                    const std::type_identity_t<Params>& params) {
    if (status_ != simt::Status{} || clusters == 0) return;
    status_ = simt::launch_cluster(kernel, static_cast<int>(clusters * size), block, size,
                                   shared_bytes, stream_, params);
  }

  void check(simt::Status status) {
    if (status_ == simt::Status{}) status_ = status;
  }

  Status status() const { return static_cast<Status>(status_); }

 private:
  simt::Stream stream_;
  simt::Status status_{};
};

// With a null base only the size is of use.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return p;
  }
  int64_t bytes() const { return static_cast<int64_t>(used_); }
  // Reaches at least as far as another one with the same base.
  void cover(const Arena& other) { used_ = used_ > other.used_ ? used_ : other.used_; }

 private:
  static constexpr int64_t kAlignment = 256;
  uintptr_t base_, used_ = 0;
};

// f(T()) with the storage type.
template <class F>
void by_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kBFloat16: return f(simt::bf16{});
    case DType::kFloat16: return f(simt::f16{});
  }
}

}  // namespace gemma_ext::cce::cuda
