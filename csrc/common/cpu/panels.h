// SPDX-License-Identifier: Apache-2.0
// Operands of a product C[M, N] = A[M, K] . B[K, N], packed for blocks that live in cache.
//
// A: rows of kDepth elements, zero-padded to whole K steps.              [M, kDepth]
// B: slices of kSlice columns, K-major; bf16 stores pairs of k together. [K / kPair, kSlice, kPair]
#pragma once

#include "matrix.h"
#include "vec.h"

namespace gemma_ext::cpu::GEMMA_EXT_ISA {

// Of every cached block: 14 x 256 x 4 B of A beside 256 x 32 x 2 B of B stay in a 32 KiB L1, and the
// 32 x 256 x 2 B of A and of B that feed the tile registers in one of 48 KiB.
constexpr int kDepth = 256;

// 14 x 2 accumulators + 2 of B + 1 broadcast = 31 of the 32 AVX-512 registers; 6 x 2 + 3 = 15 of 16.
constexpr int kGroup = kLanes == 16 ? 14 : 6;
constexpr int kSlice = 2 * kLanes;
typedef uint16_t VhWide __attribute__((vector_size(kSlice * 2)));

// Whether the tile registers of AMX multiply T.
#if defined(__AMX_BF16__) || defined(GEMMA_EXT_EMULATED_AMX)
#define GEMMA_EXT_TILES
template <class T>
constexpr bool kTiled = sizeof(T) == 2;
#else
template <class T>
constexpr bool kTiled = false;
#endif

template <class T>
constexpr int kPair = sizeof(T) == 2 ? 2 : 1;

// K of one step of the product.
template <class T>
constexpr int kStep = kTiled<T> ? 32 : kPair<T>;

// Rows of A that share a pass over B: with 112 x 256 x 4 B of A, C and B fit a small L2. Tiles
// multiply so fast that a pass over B, 1.2 MB at D 2304, has to serve twice as many rows.
template <class T>
constexpr int kBlockRows = kTiled<T> ? 256 : 8 * kGroup;

GEMMA_EXT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Whole K steps.
template <class T>
int64_t depth(int64_t k) {
  return (k + kStep<T> - 1) / kStep<T> * kStep<T>;
}

// Rows that one instruction multiplies. A block that has room for whole ones may be multiplied with
// what lies behind its last row; that cannot reach the others.
template <class T>
constexpr int kRowsAtOnce = kTiled<T> ? 16 : 1;

template <class T>
int64_t whole_rows(int64_t rows) {
  return (rows + kRowsAtOnce<T> - 1) / kRowsAtOnce<T> * kRowsAtOnce<T>;
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

template <int N>
struct Constant {
  static constexpr int kValue = N;
};

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

template <int... J>
GEMMA_EXT_INLINE void interleave(VhWide even, VhWide odd, bf16* to, Lanes<J...>) {
  typedef VhWide Loose __attribute__((aligned(2), may_alias));
  const auto half = [&](auto high) {
    constexpr int kFirst = decltype(high)::kValue ? kLanes : 0;
    return __builtin_shufflevector(even, odd, (kFirst + J / 2 + (J % 2 ? kSlice : 0))...);
  };
  *reinterpret_cast<Loose*>(to) = half(Constant<0>());
  *reinterpret_cast<Loose*>(to + kSlice) = half(Constant<1>());
}

GEMMA_EXT_INLINE void interleave(const bf16* even, const bf16* odd, bf16* to) {
  typedef VhWide Loose __attribute__((aligned(2), may_alias));
  const VhWide x = *reinterpret_cast<const Loose*>(even);
  const VhWide y = odd ? *reinterpret_cast<const Loose*>(odd) : VhWide{};
  interleave(x, y, to, CountLanes<kSlice>::Type());
}

// W columns of at most kDepth rows of m as a panel B: [slice][K / pair, kSlice, pair], slices
// kDepth rows apart. Row -1 is zero; `spare` holds 2 W.
template <class T, int W, class RowAt>
void pack_columns(const Matrix& m, int64_t column, int64_t rows, RowAt row_at, T* packed,
                  T* spare) {
  const int64_t width = least(W, m.cols - column);
  const bool plain = is_plain<T>(m) && width == W;
  const auto row = [&](int64_t r, T* spare_row) -> const T* {
    const int64_t id = r < rows ? row_at(r) : -1;
    if (id >= 0 && plain) return static_cast<const T*>(m.data) + id * m.row_stride + column;
    memset(spare_row, 0, W * sizeof(T));
    if (id >= 0) load_row<T>(m, id, column, width, spare_row);
    return spare_row;
  };
  for (int64_t r = 0; r < depth<T>(rows); r += kPair<T>) {
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

// Elements of one K-block of pack_transposed.
template <class T>
constexpr int64_t kTransposedBlock = kDepth * (kTiled<T> ? kDepth : int64_t{kBlockGroups} * kGroup);

#if defined(GEMMA_EXT_TILES)
// Two rows make one row of words, and 16 of those are transposed at a time.
inline void pack_tiles_transposed(const bf16* from, int64_t rows, bf16* packed) {
  static_assert(kStep<bf16> == 2 * kLanes);
  alignas(64) bf16 pairs[kLanes * 2 * kDepth];
  for (int64_t first = 0; first < rows; first += kStep<bf16>) {
    for (int i = 0; i < kLanes; ++i) {
      const int64_t r = first + 2 * i;
      bf16* line = pairs + i * 2 * kDepth;
      if (r >= rows) memset(line, 0, 2 * kDepth * sizeof(bf16));
      for (int v = 0; r < rows && v < kDepth; v += kSlice)
        interleave(from + r * kDepth + v, r + 1 < rows ? from + (r + 1) * kDepth + v : nullptr,
                   line + 2 * v);
    }
    bf16* to = packed + first / kDepth * kTransposedBlock<bf16> + first % kDepth;
    for (int v = 0; v < kDepth; v += kLanes) {
      Vu r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        r[i] = *reinterpret_cast<const VuLoose*>(pairs + i * 2 * kDepth + 2 * v);
      transpose<1>(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) *reinterpret_cast<VuLoose*>(to + (v + i) * kDepth) = r[i];
    }
  }
}
#endif

// Rows of kDepth columns as the transposed A, K being the rows: [K-block][group of columns][row] in
// groups, [K-block][column][row] where tiles take it.
template <class T, class S>
void pack_transposed(const S* from, int64_t rows, T* packed) {
  if constexpr (kTiled<T>) {
    return pack_tiles_transposed(from, rows, packed);
  } else {
    constexpr int kWords = kBlockGroups * kGroup;
    alignas(64) T line[kWords * kPair<T>] = {};
    for (int64_t r = 0; r < rows; r += kPair<T>) {
      const S* even = from + r * kDepth;
      for (int i = 0; i < kDepth; i += kSlice)
        interleave(even + i, r + 1 < rows ? even + kDepth + i : nullptr, line + kPair<T> * i);
      T* to = packed + r / kDepth * kTransposedBlock<T> + r % kDepth * kGroup;
      for (int g = 0; g < kBlockGroups; ++g)
        memcpy(to + g * kGroup * kDepth, line + g * kGroup * kPair<T>,
               kGroup * kPair<T> * sizeof(T));
    }
  }
}

}  // namespace gemma_ext::cpu::GEMMA_EXT_ISA
