// SPDX-License-Identifier: Apache-2.0
// Rows of any storage type as vectors of floats.
#pragma once

#include "../../common/cpu/scratch.h"
#include "dot.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {
namespace {

// Parts of a Scratch.
enum StripSlot { kStrip, kOther, kWide };

inline float* strip_of(gemma_ext::cpu::Scratch& s, int slot, int64_t floats) {
  return static_cast<float*>(s.part(slot, floats * sizeof(float)));
}

GEMMA_EXT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GEMMA_EXT_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

GEMMA_EXT_INLINE void put(float* p, Vf x) { store(p, x); }
GEMMA_EXT_INLINE void put(bf16* p, Vf x) { store(p, x); }
GEMMA_EXT_INLINE void put(half* p, Vf x) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, (__m512)x, 0);
  memcpy(p, &bits, sizeof(bits));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(x[i]);
#endif
}

// The first n of a vector, rounded to nearest even.
template <class T>
GEMMA_EXT_INLINE void put_some(T* p, Vf x, int n) {
  if (n == kLanes) return put(p, x);
  T some[kLanes];
  put(some, x);
  memcpy(p, some, n * sizeof(T));
}

// As a row of the operand of T: rounded to T, also where the operand is float.
template <class T>
GEMMA_EXT_INLINE void put_rounded(typename Operand<T>::X* p, Vf x, int n) {
  if constexpr (sizeof(T) == sizeof(*p)) {
    put_some(p, x, n);
  } else {
    T rounded[kLanes];
    put(rounded, x);
    put_some(p, load_row(rounded), n);
  }
}

// step(i, x, count) for every vector of a row, zeros behind its `count`.
template <class T, class Step>
GEMMA_EXT_INLINE void each_vector(const T* row, int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(i, load_row(row + i), kLanes);
  if (i < n) step(i, some_of(row + i, int(n - i)), int(n - i));
}

}  // namespace
}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
