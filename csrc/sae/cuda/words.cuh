// SPDX-License-Identifier: Apache-2.0
// Neighbours of a row that a thread takes at a time: 16 bytes where every row allows it, else one element.
#pragma once

#include <type_traits>

#include "launches.h"
#include "sae/lists.h"

namespace gemma_ext::sae::cuda {

constexpr int kMostThreads = 512;
constexpr int kMostWarps = kMostThreads / simt::kWarpSize;

// kV neighbours as they are stored: what is on its way takes no more registers.
template <class T, int kV>
struct Few {
  static constexpr int kBytes = kV * static_cast<int>(sizeof(T));
  struct alignas(kBytes < 16 ? kBytes : 16) Raw {
    uint32_t word[kBytes / 4];
  } raw;

  DEVICE static Few load(const T* from) { return {*reinterpret_cast<const Raw*>(from)}; }
  DEVICE float at(int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return simt::float_of(raw.word[i]);
    } else {
      return widen(T{static_cast<uint16_t>(raw.word[i / 2] >> (16 * (i % 2)))});
    }
  }
};
template <class T>
struct Few<T, 1> {
  T raw;

  DEVICE static Few load(const T* from) { return {*from}; }
  DEVICE float at(int) const { return widen(raw); }
};

template <int kV, class T>
DEVICE void store(T* to, const float (&x)[kV]) {
  if constexpr (kV == 1) {
    *to = narrow<T>(x[0]);
  } else {
    using Raw = typename Few<T, kV>::Raw;
    Raw raw;
    UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(Raw)) / 4; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        raw.word[i] = simt::bits_of(x[i]);
      } else {
        raw.word[i] = simt::pack<T>(x[2 * i], x[2 * i + 1]);
      }
    }
    *reinterpret_cast<Raw*>(to) = raw;
  }
}

// kV neighbours of row n from column d on, of any dtype.
template <int kV>
DEVICE void load_any(const Table& rows, int64_t n, int64_t d, float (&x)[kV]) {
  const auto read = [&](auto type) {
    using T = decltype(type);
    const auto few = Few<T, kV>::load(static_cast<const T*>(rows.data) + n * rows.stride + d);
    UNROLL
    for (int i = 0; i < kV; ++i) x[i] = few.at(i);
  };
  if (rows.type == DType::kFloat32) {
    read(float{});
  } else if (rows.type == DType::kBFloat16) {
    read(simt::bf16{});
  } else {
    read(simt::f16{});
  }
}

DEVICE void store_any(void* to, DType type, int64_t at, float x) {
  if (type == DType::kFloat32) {
    static_cast<float*>(to)[at] = x;
  } else if (type == DType::kBFloat16) {
    static_cast<simt::bf16*>(to)[at] = narrow<simt::bf16>(x);
  } else {
    static_cast<simt::f16*>(to)[at] = narrow<simt::f16>(x);
  }
}

template <class T>
DEVICE const T* row_of(const Table& rows, int64_t n) {
  return static_cast<const T*>(rows.data) + n * rows.stride;
}

DEVICE float warp_sum(float x) {
  UNROLL
  for (int step = simt::kWarpSize / 2; step > 0; step /= 2) x += simt::shfl_xor(x, step);
  return x;
}

// To all threads, in one order; two barriers. `s_parts` holds kMostWarps.
DEVICE float block_sum(float x, float* s_parts) {
  x = warp_sum(x);
  if (simt::lane_idx() == 0) s_parts[simt::warp_idx()] = x;
  simt::sync_block();
  float sum = 0.0f;
  for (int w = 0; w < simt::block_dim() / simt::kWarpSize; ++w) sum += s_parts[w];
  simt::sync_block();
  return sum;
}

// Whether rows of D can be read kV elements at a time.
// Null is no obstacle.
inline bool is_wide(const void* data, int64_t stride, DType dtype, int64_t D, int kV) {
  const int64_t size = size_of(dtype), word = least(kV * size, 16);
  return !data || (D % kV == 0 && stride * size % word == 0 &&
                   reinterpret_cast<uintptr_t>(data) % word == 0);
}
inline bool is_wide(const Table& rows, int64_t D, int kV) {
  return is_wide(rows.data, rows.stride, rows.type, D, kV);
}

// f(kV) with the elements of T that are read at a time.
template <class T, class F>
void by_width(bool wide, F f) {
  if (wide) {
    f(std::integral_constant<int, 16 / sizeof(T)>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

// Threads that share the words of a row evenly, in as few rounds as kMostThreads allow.
struct RowShape {
  int threads, rounds;
};
inline RowShape row_shape(int64_t D, int kV) {
  const int64_t words = most(ceil_div(D, kV), 1), rounds = ceil_div(words, kMostThreads);
  return {static_cast<int>(ceil_div(ceil_div(words, rounds), simt::kWarpSize) * simt::kWarpSize),
          static_cast<int>(rounds)};
}

}  // namespace gemma_ext::sae::cuda
