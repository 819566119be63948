// SPDX-License-Identifier: Apache-2.0
// Host side of a call: a chain of launches, and temporary memory cut from one allocation; and what every
// family's kernels need of storage types.
#pragma once

#include <type_traits>

#include "../dtype.h"
#include "../simt/simt.h"

namespace gemma_ext::cuda {

// Stops at the first launch that fails.
class Launches {
 public:
  explicit Launches(void* stream) : stream_(static_cast<simt::Stream>(stream)) {}

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

  // `from` may change once this has returned. Not for graphs, which would read it again.
  void copy_in(void* to, const void* from, int64_t bytes) {
    if (status_ != simt::Status{} || bytes == 0) return;
    status_ = simt::copy_in(to, from, bytes, stream_);
  }

  // Waits until the stream has come so far. Not for graphs.
  void copy_out(void* to, const void* from, int64_t bytes) {
    if (status_ != simt::Status{} || bytes == 0) return;
    status_ = simt::copy_out(to, from, bytes, stream_);
  }

  void check(simt::Status status) {
    if (status_ == simt::Status{}) status_ = status;
  }

  int status() const { return static_cast<int>(status_); }

 private:
  simt::Stream stream_;
  simt::Status status_{};
};

// Grid of a kernel whose blocks take turns over at most `most` units: only the device knows how many.
inline int64_t taking_turns(int64_t most) {
  constexpr int kBlocks = 16;  // per multiprocessor, 8 or 16 waves
  const int64_t blocks = int64_t{kBlocks} * simt::device().multiprocessors;
  return most < blocks ? most : blocks;
}

// With a null base only the size is of use.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    used_ += aligned(bytes);
    return p;
  }
  int64_t bytes() const { return static_cast<int64_t>(used_); }
  static int64_t aligned(int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
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

DEVICE int lesser(int a, int b) { return a < b ? a : b; }

template <class T>
DEVICE float widen(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return simt::to_float(x);
  }
}
template <class T>
DEVICE T narrow(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return simt::from_float<T>(x);
  }
}

// Two neighbours at an even index of a row of whole 16-byte words.
struct Pair {
  float x, y;
};
template <class T>
DEVICE Pair load_pair(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return {from[0], from[1]};
  } else {
    const uint32_t both = *reinterpret_cast<const uint32_t*>(from);
    return {widen(T{static_cast<uint16_t>(both)}), widen(T{static_cast<uint16_t>(both >> 16)})};
  }
}
template <class T>
DEVICE void store_pair(T* to, float x, float y) {
  if constexpr (std::is_same_v<T, float>) {
    to[0] = x;
    to[1] = y;
  } else {
    *reinterpret_cast<uint32_t*>(to) = simt::pack<T>(x, y);
  }
}

}  // namespace gemma_ext::cuda
