// SPDX-License-Identifier: Apache-2.0
// Products of rows with rows, both along K as they lie in memory: nothing is packed, so that a weight is read once
// and a few rows against it cost what reading it costs.
//
// An output is a sum over K in blocks of kChain; a block is one chain of products per lane, and the lanes are added
// in one order. So its bits depend on its row and column alone, not on who stands beside them.
#pragma once

#include <string.h>

#include "../../common/cpu/storage.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {
namespace {

using namespace gemma_ext::cpu::GEMMA_EXT_ISA;

GEMMA_EXT_INLINE Vf load_row(const int8_t* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vf)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#else
  Vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = float(p[i]);
  return x;
#endif
}

// The first n of a vector, 0 behind.
template <class T>
GEMMA_EXT_INLINE Vf some_of(const T* p, int n) {
  T some[kLanes] = {};
  memcpy(some, p, n * sizeof(T));
  return load_row(some);
}

// How rows x are held for a weight of T: padded with zeros to whole vectors.
template <class T>
struct Operand {
  using X = float;
  using V = Vf;
  static constexpr int kStep = kLanes;
  static GEMMA_EXT_INLINE V of_x(const X* p) { return load(p); }
  static GEMMA_EXT_INLINE V of_w(const T* p) { return load_row(p); }
  static GEMMA_EXT_INLINE V of_w(const T* p, int n) { return some_of(p, n); }
  static GEMMA_EXT_INLINE Vf add(Vf sum, V x, V w) { return sum + x * w; }
};

#if defined(__AVX512BF16__)
template <>
struct Operand<bf16> {
  using X = bf16;
  using V = __m512i;
  static constexpr int kStep = 2 * kLanes;
  static GEMMA_EXT_INLINE V of_x(const X* p) { return _mm512_loadu_si512(p); }
  static GEMMA_EXT_INLINE V of_w(const bf16* p) { return _mm512_loadu_si512(p); }
  static GEMMA_EXT_INLINE V of_w(const bf16* p, int n) {
    return _mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), p);
  }
  static GEMMA_EXT_INLINE Vf add(Vf sum, V x, V w) {
    return (Vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
};
#endif

// 8 KiB of each of four columns' floats stay in L1, and 64 rows' in L2.
constexpr int64_t kChain = 2048;

// 6 x 4 accumulators + 4 of w + 1 of x = 29 of the 32 AVX-512 registers; 2 x 4 + 5 = 13 of 16.
constexpr int kRowsAtOnce = kLanes == 16 ? 6 : 2;
constexpr int kColumnsAtOnce = 4;

template <int N, int... J>
struct CountLanes : CountLanes<N - 1, N - 1, J...> {};
template <int... J>
struct CountLanes<0, J...> {
  template <class F>
  static GEMMA_EXT_INLINE Vf run(F f) {
    return f.template operator()<J...>();
  }
};

template <int N>
struct Constant {
  static constexpr int kValue = N;
};

typedef float V4 __attribute__((vector_size(16)));
typedef float V4Loose __attribute__((vector_size(16), aligned(4), may_alias));

// The sums of the lanes of four vectors.
GEMMA_EXT_INLINE V4 sums(Vf a, Vf b, Vf c, Vf d) {
  // in every group of four lanes: a0 + a2, b0 + b2, a1 + a3, b1 + b3
  const auto halves = [](Vf x, Vf y) __attribute__((always_inline)) {
    return CountLanes<kLanes>::run([&]<int... J>() __attribute__((always_inline)) {
      return __builtin_shufflevector(x, y, (J / 4 * 4 + J % 4 / 2 + (J % 2 ? kLanes : 0))...) +
             __builtin_shufflevector(x, y, (J / 4 * 4 + J % 4 / 2 + 2 + (J % 2 ? kLanes : 0))...);
    });
  };
  const Vf ab = halves(a, b), cd = halves(c, d);
  const Vf all = CountLanes<kLanes>::run([&]<int... J>() __attribute__((always_inline)) {
    return __builtin_shufflevector(ab, cd, (J / 4 * 4 + J % 2 + (J % 4 > 1 ? kLanes : 0))...) +
           __builtin_shufflevector(ab, cd, (J / 4 * 4 + J % 2 + 2 + (J % 4 > 1 ? kLanes : 0))...);
  });
  const auto group = [&](auto at) __attribute__((always_inline)) {
    constexpr int k = decltype(at)::kValue < kLanes ? decltype(at)::kValue : 0;
    return __builtin_shufflevector(all, all, k, k + 1, k + 2, k + 3);
  };
  V4 total = group(Constant<0>());
  if constexpr (kLanes >= 8) total += group(Constant<4>());
  if constexpr (kLanes == 16) total += group(Constant<8>()) + group(Constant<12>());
  return total;
}

// out[m * ld + f] (+)= x_m . w_f over k: M rows, `columns` <= kColumnsAtOnce of w. What lies `ahead` elements behind
// those is on its way to the cache meanwhile, if that is not 0.
template <int M, class T>
void product(const typename Operand<T>::X* x, int64_t ldx, const T* const* w, int columns,
             int64_t k, int64_t ahead, float* out, int64_t ld, bool accumulate) {
  using Op = Operand<T>;
  Vf sum[M][kColumnsAtOnce] = {};
  int64_t i = 0;
  const auto step = [&](auto read) __attribute__((always_inline)) {
    typename Op::V right[kColumnsAtOnce];
#pragma GCC unroll 4
    for (int f = 0; f < kColumnsAtOnce; ++f) right[f] = read(w[f] + i);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const auto left = Op::of_x(x + m * ldx + i);
#pragma GCC unroll 4
      for (int f = 0; f < kColumnsAtOnce; ++f) sum[m][f] = Op::add(sum[m][f], left, right[f]);
    }
  };
  const auto whole = [](const T* p) __attribute__((always_inline)) { return Op::of_w(p); };
  if (ahead)
    for (; i + Op::kStep <= k; i += Op::kStep) {
#pragma GCC unroll 4
      for (int f = 0; f < kColumnsAtOnce; ++f) __builtin_prefetch(w[f] + i + ahead);
      step(whole);
    }
  for (; i + Op::kStep <= k; i += Op::kStep) step(whole);
  if (i < k) {
    const int rest = int(k - i);
    step([rest](const T* p) __attribute__((always_inline)) { return Op::of_w(p, rest); });
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    const V4 total = sums(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
    float* to = out + m * ld;
    if (columns == kColumnsAtOnce) {
      V4Loose* four = reinterpret_cast<V4Loose*>(to);
      *four = accumulate ? *four + total : total;
    } else {
      for (int f = 0; f < columns; ++f) to[f] = accumulate ? to[f] + total[f] : total[f];
    }
  }
}

template <int M, class T>
GEMMA_EXT_INLINE void product_of(int m, const typename Operand<T>::X* x, int64_t ldx,
                                 const T* const* w, int columns, int64_t k, int64_t ahead,
                                 float* out, int64_t ld, bool accumulate) {
  if constexpr (M > 0) {
    if (m == M)
      product<M, T>(x, ldx, w, columns, k, ahead, out, ld, accumulate);
    else
      product_of<M - 1, T>(m, x, ldx, w, columns, k, ahead, out, ld, accumulate);
  }
}

// out[m * ld + f] (+)= x_m . row(f) over K; x padded, ldx elements apart. `ahead`: of a pass over rows that will be
// followed by the next ones, the distance of kColumnsAtOnce.
template <class T, class RowAt>
void products(int64_t rows, int64_t columns, int64_t K, const typename Operand<T>::X* x,
              int64_t ldx, const RowAt& row, float* out, int64_t ld, bool accumulate,
              int64_t ahead = 0) {
  if (K == 0 && !accumulate)
    for (int64_t m = 0; m < rows; ++m) memset(out + m * ld, 0, columns * sizeof(float));
  const int64_t groups = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  for (int64_t k = 0; k < K; k += kChain) {
    const int64_t depth = K - k < kChain ? K - k : kChain;
    for (int64_t f = 0; f < columns; f += kColumnsAtOnce) {
      const int count = int(columns - f < kColumnsAtOnce ? columns - f : kColumnsAtOnce);
      const T* w[kColumnsAtOnce];
      for (int i = 0; i < kColumnsAtOnce; ++i) w[i] = row(f + (i < count ? i : 0)) + k;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = rows * g / groups, end = rows * (g + 1) / groups;
        product_of<kRowsAtOnce, T>(int(end - begin), x + begin * ldx + k, ldx, w, count, depth,
                                   g == 0 ? ahead : 0, out + begin * ld + f, ld,
                                   accumulate || k > 0);
      }
    }
  }
}

}  // namespace
}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
