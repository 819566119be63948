// SPDX-License-Identifier: Apache-2.0
// Elements of any storage type as vectors of floats; in the namespace of the instruction set, like vec.h.
#pragma once

#include <string.h>

#include "../dtype.h"
#include "vec.h"

namespace gemma_ext::cpu::GEMMA_EXT_ISA {

struct half {
  uint16_t bits;
};

GEMMA_EXT_INLINE Vf load_row(const float* p) { return load(p); }

// gcc 12 takes __builtin_convertvector apart into single elements, and warns of its own headers where an
// instruction has no mask.
GEMMA_EXT_INLINE Vf load_row(const bf16* p) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vf)((Vu)_mm512_maskz_cvtepu16_epi32(0xffff, bits) << 16);
#elif defined(__AVX2__) && !defined(GEMMA_EXT_EMULATED_AMX)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vf)((Vu)_mm256_cvtepu16_epi32(bits) << 16);
#else
  return load(p);
#endif
}

GEMMA_EXT_INLINE Vf load_row(const half* p) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vf)_mm512_maskz_cvtph_ps(0xffff, bits);
#elif defined(__F16C__) && !defined(GEMMA_EXT_EMULATED_AMX)
  return (Vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = half_to_float(p[i].bits);
  return x;
#endif
}

// The first n of a vector, 0 behind.
template <class T>
GEMMA_EXT_INLINE Vf load_some(const T* p, int n) {
  T some[kLanes] = {};
  memcpy(some, p, n * sizeof(T));
  return load_row(some);
}

// call(T()) with the storage type.
template <class Call>
GEMMA_EXT_INLINE void with_type(DType type, const Call& call) {
  if (type == DType::kFloat32) call(float());
  if (type == DType::kBFloat16) call(bf16());
  if (type == DType::kFloat16) call(half());
}

}  // namespace gemma_ext::cpu::GEMMA_EXT_ISA
