// SPDX-License-Identifier: Apache-2.0
// C[M, NR] = A[M, K] . B[K, NR] for blocks that live in cache; the only matrix product of this family.
//
// A: rows of kTile elements, row-major, zero-padded to whole K steps.   [M, kTile]
// B: one slice of kSlice columns, K-major; bf16 stores pairs of k together. [K / kPair, kSlice, kPair]
// C: float.
// float storage multiplies in fp32. bf16 uses VDPBF16PS (exact products, fp32 sums), so its results
// need no rounding of the logits; it exists only in the avx512bf16 build.
#pragma once

#include "../../common/dtype.h"
#include "../../common/vec.h"
#include "../params.h"

namespace gemma_ext::GEMMA_EXT_ISA {

// 14 x 2 accumulators + 2 of B + 1 broadcast = 31 of the 32 AVX-512 registers; 6 x 2 + 3 = 15 of 16.
constexpr int kGroup = kLanes == 16 ? 14 : 6;
constexpr int kSlice = 2 * kLanes;
constexpr int kSlices = kTile / kSlice;
constexpr int kBlockRows =
    8 * kGroup;  // rows of A that share a pass over B: 112 x 256 x 4 B fits L2

template <class T>
constexpr int kPair = sizeof(T) == 2 ? 2 : 1;

// Loading: any storage type, any strides, to the compute type T.

GEMMA_EXT_INLINE void put(float* to, float x) { *to = x; }
GEMMA_EXT_INLINE void put(bf16* to, float x) { to->bits = float_to_bf16(x); }

// Rows of m can be read in place as T.
template <class T>
GEMMA_EXT_INLINE bool is_plain(const Matrix& m) {
  return m.col_stride == 1 && m.dtype == (sizeof(T) == 4 ? DType::kFloat32 : DType::kBFloat16);
}

template <class T>
void load_row(const Matrix& m, int64_t row, int64_t col, int64_t n, T* dst) {
  const int64_t at = row * m.row_stride + col * m.col_stride, step = m.col_stride;
  if (m.dtype == DType::kFloat32) {
    const float* src = static_cast<const float*>(m.data) + at;
    if (sizeof(T) == 4 && step == 1)
      memcpy(dst, src, n * 4);
    else
      for (int64_t i = 0; i < n; ++i) put(dst + i, src[i * step]);
    return;
  }
  const uint16_t* src = static_cast<const uint16_t*>(m.data) + at;
  if (m.dtype == DType::kBFloat16) {
    if (sizeof(T) == 2 && step == 1)
      memcpy(dst, src, n * 2);
    else if (step == 1)
      for (int64_t i = 0; i < n; ++i) put(dst + i, bf16_to_float(src[i]));
    else
      for (int64_t i = 0; i < n; ++i) put(dst + i, bf16_to_float(src[i * step]));
  } else if (step == 1) {
    for (int64_t i = 0; i < n; ++i) put(dst + i, half_to_float(src[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) put(dst + i, half_to_float(src[i * step]));
  }
}

// Packing B.

// Four rows of 32-bit words -> [words][kSlice] at one place of the slice.
GEMMA_EXT_INLINE void transpose_words(const uint32_t* const row[4], int64_t words, uint32_t* to) {
  typedef uint32_t V4 __attribute__((vector_size(16), aligned(4), may_alias));
  const auto at = [](const uint32_t* p) { return *reinterpret_cast<const V4*>(p); };
  const auto put4 = [](uint32_t* p, V4 x) { *reinterpret_cast<V4*>(p) = x; };
  const int64_t words4 = words & ~int64_t{3};
  for (int64_t k = 0; k < words4; k += 4, to += 4 * kSlice) {
    const V4 a = at(row[0] + k), b = at(row[1] + k), c = at(row[2] + k), d = at(row[3] + k);
    const V4 ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const V4 ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const V4 cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const V4 cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    put4(to, __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5));
    put4(to + kSlice, __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7));
    put4(to + 2 * kSlice, __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5));
    put4(to + 3 * kSlice, __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7));
  }
  for (int64_t k = words4; k < words; ++k, to += kSlice)
    for (int i = 0; i < 4; ++i) to[i] = row[i][k];
}

// One K step of a slice from the rows that make it: a copy, or for bf16 two rows interleaved
// (odd may be null: the K beyond the last is zero).
GEMMA_EXT_INLINE void interleave(const float* row, const float*, float* to) {
  store(to, load(row));
  store(to + kLanes, load(row + kLanes));
}

GEMMA_EXT_INLINE void interleave(const bf16* even, const bf16* odd, bf16* to) {
  const auto wide = [](const bf16* p) {
    return __builtin_convertvector(*reinterpret_cast<const VhLoose*>(p), Vu);
  };
  for (int half = 0; half < kSlice; half += kLanes) {
    Vu x = wide(even + half);
    if (odd) x |= wide(odd + half) << 16;
    *reinterpret_cast<VuLoose*>(to + 2 * half) = x;
  }
}

// The micro-kernel.

// How A lies in memory: rows of kTile, or groups of kGroup rows with K outermost, each K step (pair,
// for bf16) of a group adjacent: strips whose rows become K are packed so, because a step of a
// kilobyte would put a whole K-block into four sets of the L1.
enum class Layout { kRows, kGroups };

template <int M, class T, Layout L>
void micro(int64_t k, const T* a, const T* b, float* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kRow = L == Layout::kRows ? kTile : kPair<T>;
  constexpr int64_t kStep = L == Layout::kRows ? kPair<T> : kGroup * kPair<T>;
  Vf x[M], y[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    x[m] = accumulate ? load(c + m * ldc) : Vf{};
    y[m] = accumulate ? load(c + m * ldc + kLanes) : Vf{};
  }
  if constexpr (kPair<T> == 1) {
    for (int64_t i = 0; i < k; ++i, a += kStep, b += kSlice) {
      const Vf b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vf s = set1(a[m * kRow]);
        x[m] += s * b0;
        y[m] += s * b1;
      }
    }
  } else {
#if defined(__AVX512BF16__)
    for (int64_t i = 0; i < k; i += 2, a += kStep, b += 2 * kSlice) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b);
      const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + kSlice);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        int32_t pair;
        memcpy(&pair, a + m * kRow, 4);
        const __m512bh s = (__m512bh)_mm512_set1_epi32(pair);
        x[m] = _mm512_dpbf16_ps(x[m], s, b0);
        y[m] = _mm512_dpbf16_ps(y[m], s, b1);
      }
    }
#endif
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    store(c + m * ldc, x[m]);
    store(c + m * ldc + kLanes, y[m]);
  }
}

template <class T, Layout L, int M = kGroup>
GEMMA_EXT_INLINE void micro_tail(int m, int64_t k, const T* a, const T* b, float* c, int64_t ldc,
                                 bool accumulate) {
  if constexpr (M > 0) {
    if (m == M)
      micro<M, T, L>(k, a, b, c, ldc, accumulate);
    else
      micro_tail<T, L, M - 1>(m, k, a, b, c, ldc, accumulate);
  }
}

// C[rows, slices * kSlice] (+)= A[rows, k <= kTile] . B, B's slices b_stride elements apart.
template <class T, Layout L = Layout::kRows>
void block_product(int64_t rows, int slices, int64_t k, const T* a, const T* b, int64_t b_stride,
                   float* c, int64_t ldc, bool accumulate) {
  for (int s = 0; s < slices; ++s)
    for (int64_t r = 0; r < rows; r += kGroup) {
      const int m = rows - r < kGroup ? int(rows - r) : kGroup;
      micro_tail<T, L>(m, k, a + r * kTile, b + s * b_stride, c + r * ldc + s * kSlice, ldc,
                       accumulate);
    }
}

}  // namespace gemma_ext::GEMMA_EXT_ISA
