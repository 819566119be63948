// SPDX-License-Identifier: Apache-2.0
// C[M, N] (+)= A[M, K] . B[K, N] for packed blocks that live in cache; C is float.
//
// float multiplies in fp32. bf16 uses the tiles of AMX or VDPBF16PS (exact products, fp32 sums), so its
// results need no rounding of the logits; a build that has neither widens while packing.
#pragma once

#include "panels.h"
#if defined(GEMMA_EXT_TILES)
#include "amx.h"
#endif

namespace gemma_ext::cpu::GEMMA_EXT_ISA {

// The tile registers of this thread, where products of T need them, for as long as it lives.
template <class T>
struct TileRegisters {
  TileRegisters() {}
};

// A: rows kDepth apart, or where tiles multiply any distance.
template <class T>
struct Rows {
  const T* at;
  int64_t stride;

  Rows(const T* block) : at(block), stride(kDepth) {}
  Rows(const T* rows, int64_t stride) : at(rows), stride(stride) {}
};

#if defined(GEMMA_EXT_TILES)
// Tiles 0 to 3 are 32 x 32 of C, 4 and 5 rows of A, 6 and 7 columns of B. Four of C take four loads for
// four products, which take twice as long, and their chains of additions do not wait for each other.
inline void shape_tiles(int rows) {
  amx::Config config;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = t < 6 ? rows : amx::kRows;
    config.bytes[t] = amx::kBytes;
  }
  GEMMA_EXT_TILE_CONFIGURE(&config);
}

template <>
struct TileRegisters<bf16> {
  TileRegisters() { shape_tiles(amx::kRows); }
  ~TileRegisters() { GEMMA_EXT_TILE_RELEASE(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// M tiles of rows against one slice.
template <int M>
GEMMA_EXT_INLINE void tile_micro(int64_t k, const bf16* a, int64_t lda, const bf16* b, float* c,
                                 int64_t ldc, bool accumulate) {
  constexpr int64_t kRow = 2 * kSlice * sizeof(bf16);  // of B: a pair of k
  const int64_t a_row = lda * sizeof(bf16), c_row = ldc * sizeof(float);
  float* c1 = c + amx::kRows * ldc;
  const bf16* a1 = a + amx::kRows * lda;
  if (accumulate) {
    GEMMA_EXT_TILE_LOAD(0, c, c_row);
    GEMMA_EXT_TILE_LOAD(1, c + 16, c_row);
    if (M == 2) {
      GEMMA_EXT_TILE_LOAD(2, c1, c_row);
      GEMMA_EXT_TILE_LOAD(3, c1 + 16, c_row);
    }
  } else {
    GEMMA_EXT_TILE_ZERO(0);
    GEMMA_EXT_TILE_ZERO(1);
    if (M == 2) {
      GEMMA_EXT_TILE_ZERO(2);
      GEMMA_EXT_TILE_ZERO(3);
    }
  }
#pragma GCC unroll 1
  for (int64_t i = 0; i < k; i += kStep<bf16>) {
    GEMMA_EXT_TILE_LOAD(4, a + i, a_row);
    GEMMA_EXT_TILE_LOAD(6, b + i * kSlice, kRow);
    GEMMA_EXT_TILE_DOT(0, 4, 6);
    GEMMA_EXT_TILE_LOAD(7, b + i * kSlice + 32, kRow);
    GEMMA_EXT_TILE_DOT(1, 4, 7);
    if (M == 2) {
      GEMMA_EXT_TILE_LOAD(5, a1 + i, a_row);
      GEMMA_EXT_TILE_DOT(2, 5, 6);
      GEMMA_EXT_TILE_DOT(3, 5, 7);
    }
  }
  GEMMA_EXT_TILE_STORE(0, c, c_row);
  GEMMA_EXT_TILE_STORE(1, c + 16, c_row);
  if (M == 2) {
    GEMMA_EXT_TILE_STORE(2, c1, c_row);
    GEMMA_EXT_TILE_STORE(3, c1 + 16, c_row);
  }
}

__attribute__((noinline)) inline void tile_product(int64_t rows, int slices, int64_t k,
                                                   Rows<bf16> left, const bf16* b, int64_t b_stride,
                                                   float* c, int64_t ldc, bool accumulate,
                                                   const bf16* next) {
  const bf16* a = left.at;
  const int64_t lda = left.stride;
  constexpr int64_t kWide = 2 * amx::kRows, kLine = 64 / sizeof(bf16);
  GEMMA_EXT_TILE_FENCE(b);
  for (int s = 0; s < slices; ++s) {
    const bf16* panel = b + s * b_stride;
    float* to = c + s * kSlice;
    int64_t r = 0;
    for (; r + kWide <= rows; r += kWide) {
      if (next)
        for (int64_t i = r; i < r + kWide; ++i)
          for (int64_t at = s * kLine; at < kDepth; at += slices * kLine)
            __builtin_prefetch(next + i * lda + at, 0, 2);
      tile_micro<2>(k, a + r * lda, lda, panel, to + r * ldc, ldc, accumulate);
    }
    if (r + amx::kRows <= rows)
      tile_micro<1>(k, a + r * lda, lda, panel, to + r * ldc, ldc, accumulate);
  }
  const int64_t tail = rows % amx::kRows, done = rows - tail;
  if (!tail) return;
  shape_tiles(int(tail));
  for (int s = 0; s < slices; ++s)
    tile_micro<1>(k, a + done * lda, lda, b + s * b_stride, c + done * ldc + s * kSlice, ldc,
                  accumulate);
  shape_tiles(amx::kRows);
}
#endif

template <int M, class T, Layout L>
void micro(int64_t k, const T* a, const T* b, float* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kRow = L == Layout::kRows ? kDepth : kPair<T>;
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

// C[rows, slices * kSlice] (+)= A[rows, k <= kDepth] . B, B's slices b_stride elements apart. The rows
// at `next`, as many as those of A and as far apart, are on their way to L2 meanwhile.
template <class T, Layout L = Layout::kRows>
void block_product(int64_t rows, int slices, int64_t k, Rows<T> a, const T* b, int64_t b_stride,
                   float* c, int64_t ldc, bool accumulate, const T* next = nullptr) {
  if constexpr (kTiled<T>) {
    tile_product(rows, slices, depth<T>(k), a, b, b_stride, c, ldc, accumulate, next);
  } else {
    constexpr int64_t kLine = 64 / sizeof(T);
    const char* ahead = reinterpret_cast<const char*>(next);
    const int64_t share = kGroup * kDepth / kLine / slices + 1;
    for (int s = 0; s < slices; ++s)
      for (int64_t r = 0; r < rows; r += kGroup) {
        const int m = rows - r < kGroup ? int(rows - r) : kGroup;
        if (next)
          for (int64_t i = 0; i < share; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        micro_tail<T, L>(m, k, a.at + r * kDepth, b + s * b_stride, c + r * ldc + s * kSlice, ldc,
                         accumulate);
      }
  }
}

}  // namespace gemma_ext::cpu::GEMMA_EXT_ISA
