// SPDX-License-Identifier: Apache-2.0
// Small encoders and lists of whole numbers, whose products are exact, in memory as long as they are.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>

#include "check.h"
#include "sae/cuda/engine.h"

namespace sae_test {

using namespace gemma_ext::sae;
namespace cuda = gemma_ext::sae::cuda;
using gemma_ext::DType;

template <class T>
struct Storage;
template <>
struct Storage<float> {
  static constexpr DType kType = DType::kFloat32;
  static float of(float x) { return x; }
};
template <>
struct Storage<simt::bf16> {
  static constexpr DType kType = DType::kBFloat16;
  static simt::bf16 of(float x) { return simt::from_float<simt::bf16>(x); }
};

inline double value_of(float x) { return x; }
inline double value_of(simt::bf16 x) { return simt::to_float(x); }

// 16-byte aligned, as allocators of tensors are.
template <class T>
class Array {
 public:
  explicit Array(int64_t count) : count_(count) {
    void* p = nullptr;
    const size_t bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T);
    if (posix_memalign(&p, 256, bytes) != 0) throw std::bad_alloc();
    memset(p, 0x7f, bytes);
    held_.reset(static_cast<T*>(p), free);
  }
  T* data() const { return held_.get(); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) const { return held_.get()[i]; }

 private:
  std::shared_ptr<T> held_;
  int64_t count_;
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine_); }
  template <class T>
  Array<T> numbers(int64_t count, int low = -3, int high = 3) {
    Array<T> x(count);
    for (int64_t i = 0; i < count; ++i)
      x[i] = Storage<T>::of(static_cast<float>(between(low, high)));
    return x;
  }

 private:
  std::mt19937 engine_;
};

template <class Call, class... More>
void run(const Call& call, const More&... more) {
  const Array<uint8_t> memory(cuda::workspace(call));
  EXPECT(cuda::run(call, memory.data(), nullptr, more...) == 0);
}

inline bool same(double x, double y) { return x == y || (std::isnan(x) && std::isnan(y)); }

}  // namespace sae_test
