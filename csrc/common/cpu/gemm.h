// SPDX-License-Identifier: Apache-2.0
// C[M, NR] = A[M, K] . B[K, NR] for blocks that live in cache, and the packing of their operands.
//
// A: rows of kDepth elements, row-major, zero-padded to whole K steps.  [M, kDepth]
// B: one slice of kSlice columns, K-major; bf16 stores pairs of k together. [K / kPair, kSlice, kPair]
// C: float.
// float multiplies in fp32. bf16 uses VDPBF16PS (exact products, fp32 sums), so its results need no
// rounding of the logits; it exists only in the avx512bf16 build, the others widen while packing.
#pragma once

#include "matrix.h"
#include "vec.h"

namespace gemma_ext::cpu::GEMMA_EXT_ISA {

// 14 x 256 x 4 B of A beside 256 x 32 x 2 B of B stay in a 32 KiB L1.
constexpr int kDepth = 256;

// 14 x 2 accumulators + 2 of B + 1 broadcast = 31 of the 32 AVX-512 registers; 6 x 2 + 3 = 15 of 16.
constexpr int kGroup = kLanes == 16 ? 14 : 6;
constexpr int kSlice = 2 * kLanes;
constexpr int kBlockRows =
    8 * kGroup;  // rows of A that share a pass over B: 112 x 256 x 4 B fits L2

template <class T>
constexpr int kPair = sizeof(T) == 2 ? 2 : 1;

GEMMA_EXT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Whole K steps.
template <class T>
int64_t depth(int64_t k) {
  return (k + kPair<T> - 1) / kPair<T> * kPair<T>;
}

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

GEMMA_EXT_INLINE Vu words_at(const uint32_t* p) { return *reinterpret_cast<const VuLoose*>(p); }
GEMMA_EXT_INLINE Vu words_at(const bf16* p) { return (Vu)load(p); }  // widened
GEMMA_EXT_INLINE uint32_t word_at(const uint32_t* p) { return *p; }
GEMMA_EXT_INLINE uint32_t word_at(const bf16* p) { return uint32_t{p->bits} << 16; }

template <int... J>
struct Lanes {};
template <int N, int... J>
struct CountLanes : CountLanes<N - 1, N - 1, J...> {};
template <int... J>
struct CountLanes<0, J...> {
  using Type = Lanes<J...>;
};

// One step of a butterfly transposition: exchanges the off-diagonal blocks of S x S.
template <int S, int... J>
GEMMA_EXT_INLINE void exchange(Vu* r, Lanes<J...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & S)) {
      const Vu a = r[i], b = r[i + S];
      r[i] = __builtin_shufflevector(a, b, (J & S ? kLanes + J - S : J)...);
      r[i + S] = __builtin_shufflevector(a, b, (J & S ? kLanes + J : J + S)...);
    }
}

template <int S>
GEMMA_EXT_INLINE void transpose(Vu* r) {
  if constexpr (S < kLanes) {
    exchange<S>(r, CountLanes<kLanes>::Type());
    transpose<2 * S>(r);
  }
}

// kLanes rows of 32-bit words -> [words][kSlice] at one place of the slice.
template <class Source>
void transpose_words(const void* const row[kLanes], int64_t words, uint32_t* to) {
  const auto at = [&](int i, int64_t k) { return static_cast<const Source*>(row[i]) + k; };
  const int64_t whole = words / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes, to += kLanes * kSlice) {
    Vu r[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) r[i] = words_at(at(i, k));
    transpose<1>(r);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) *reinterpret_cast<VuLoose*>(to + i * kSlice) = r[i];
  }
  for (int64_t k = whole; k < words; ++k, to += kSlice)
    for (int i = 0; i < kLanes; ++i) to[i] = word_at(at(i, k));
}

// Rows of m, as many as the panel is wide (whole slices), as a panel B ready for the product:
// [slice][K / pair, kSlice, pair]. Row -1 is zero. Rows are read in place where they hold words of T
// or, for a float T, bfloat16 to be widened on the way; `spare` holds kLanes rows.
template <class T, class RowAt>
void pack_rows(const Matrix& m, int width, RowAt row_at, T* packed, T* spare) {
  const int64_t d = depth<T>(m.cols), words = d / kPair<T>;
  const bool widen = sizeof(T) == 4 && m.dtype == DType::kBFloat16 && m.col_stride == 1;
  const bool plain = widen || (is_plain<T>(m) && d == m.cols);
  for (int v = 0; v < width; v += kLanes) {
    const void* row[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t id = row_at(v + i);
      if (id >= 0 && plain) {
        row[i] = static_cast<const char*>(m.data) + id * m.row_stride * size_of(m.dtype);
        continue;
      }
      T* to = spare + i * d;
      memset(to, 0, d * sizeof(T));
      if (id >= 0) load_row<T>(m, id, 0, m.cols, to);
      row[i] = to;
    }
    uint32_t* to = reinterpret_cast<uint32_t*>(packed + v / kSlice * kSlice * d) + v % kSlice;
    if (widen)
      transpose_words<bf16>(row, words, to);
    else
      transpose_words<uint32_t>(row, words, to);
  }
}

// One K step of a slice from the rows that make it: a copy, or for bf16 two rows interleaved
// (odd may be null: the K beyond the last is zero).
GEMMA_EXT_INLINE void interleave(const float* row, const float*, float* to) {
  store(to, load(row));
  store(to + kLanes, load(row + kLanes));
}

GEMMA_EXT_INLINE void interleave(const bf16* row, const bf16*, float* to) {
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

// W columns of at most kDepth rows of m as a panel B: [slice][K / pair, kSlice, pair], slices
// kDepth rows apart. Row -1 is zero; `spare` holds 2 W.
template <class T, int W, class RowAt>
void pack_columns(const Matrix& m, int64_t column, int64_t rows, RowAt row_at, T* packed,
                  T* spare) {
  const int64_t width = least(W, m.cols - column);
  const bool plain = is_plain<T>(m) && width == W;
  const auto row = [&](int64_t r, T* spare_row) -> const T* {
    const int64_t id = row_at(r);
    if (id >= 0 && plain) return static_cast<const T*>(m.data) + id * m.row_stride + column;
    memset(spare_row, 0, W * sizeof(T));
    if (id >= 0) load_row<T>(m, id, column, width, spare_row);
    return spare_row;
  };
  for (int64_t r = 0; r < rows; r += kPair<T>) {
    const T* even = row(r, spare);
    const T* odd = kPair<T> == 2 && r + 1 < rows ? row(r + 1, spare + W) : nullptr;
    for (int i = 0; i < W; i += kSlice)
      interleave(even + i, odd ? odd + i : nullptr, packed + i * kDepth + r * kSlice);
  }
}

// Packing A.

// How A lies in memory: rows of kDepth, or groups of kGroup rows with K outermost, each K step (pair,
// for bf16) of a group adjacent: strips whose rows become K are packed so, because a step of a
// kilobyte would put a whole K-block into four sets of the L1.
enum class Layout { kRows, kGroups };

constexpr int kBlockGroups = (kDepth + kGroup - 1) / kGroup;
// Elements of one K-block of kDepth columns in groups.
constexpr int64_t kGroupsSize = int64_t{kBlockGroups} * kGroup * kDepth;

// Rows of kDepth columns as the transposed A, K being the rows: [K-block][group of columns][row].
template <class T, class S>
void pack_transposed(const S* from, int64_t rows, T* packed) {
  constexpr int kWords = kBlockGroups * kGroup;
  alignas(64) T line[kWords * kPair<T>] = {};
  for (int64_t r = 0; r < rows; r += kPair<T>) {
    const S* even = from + r * kDepth;
    for (int i = 0; i < kDepth; i += kSlice)
      interleave(even + i, r + 1 < rows ? even + kDepth + i : nullptr, line + kPair<T> * i);
    T* to = packed + r / kDepth * kGroupsSize + r % kDepth * kGroup;
    for (int g = 0; g < kBlockGroups; ++g)
      memcpy(to + g * kGroup * kDepth, line + g * kGroup * kPair<T>, kGroup * kPair<T> * sizeof(T));
  }
}

// The product.

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
// at `next`, as many as those of A, are on their way to L2 meanwhile.
template <class T, Layout L = Layout::kRows>
void block_product(int64_t rows, int slices, int64_t k, const T* a, const T* b, int64_t b_stride,
                   float* c, int64_t ldc, bool accumulate, const T* next = nullptr) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const char* ahead = reinterpret_cast<const char*>(next);
  const int64_t share = kGroup * kDepth / kLine / slices + 1;
  for (int s = 0; s < slices; ++s)
    for (int64_t r = 0; r < rows; r += kGroup) {
      const int m = rows - r < kGroup ? int(rows - r) : kGroup;
      if (next)
        for (int64_t i = 0; i < share; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
      micro_tail<T, L>(m, k, a + r * kDepth, b + s * b_stride, c + r * ldc + s * kSlice, ldc,
                       accumulate);
    }
}

}  // namespace gemma_ext::cpu::GEMMA_EXT_ISA
