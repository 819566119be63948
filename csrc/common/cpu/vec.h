// SPDX-License-Identifier: Apache-2.0
// One float vector for every instruction set: its width follows the flags of the translation unit.
//
// Everything here lives in a namespace named after the instruction set (GEMMA_EXT_ISA), because the
// same source is compiled several times into one library: an inline function shared between two
// builds would let the linker keep the wrong one. For the same reason no std:: template is used.
#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef GEMMA_EXT_ISA
#error "GEMMA_EXT_ISA names the namespace of this build"
#endif

#define GEMMA_EXT_INLINE inline __attribute__((always_inline))

namespace gemma_ext::cpu::GEMMA_EXT_ISA {

#if defined(__AVX512F__) || defined(GEMMA_EXT_EMULATED_AMX)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t Vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Vh __attribute__((vector_size(kLanes * 2)));
typedef float VfLoose __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t VuLoose __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t VhLoose __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

GEMMA_EXT_INLINE Vf load(const float* p) { return *reinterpret_cast<const VfLoose*>(p); }
GEMMA_EXT_INLINE void store(float* p, Vf x) { *reinterpret_cast<VfLoose*>(p) = x; }
GEMMA_EXT_INLINE Vf set1(float x) { return x - Vf{}; }
GEMMA_EXT_INLINE Vi set1(int32_t x) { return x - Vi{}; }
GEMMA_EXT_INLINE Vi iota() {
  Vi x{};
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

GEMMA_EXT_INLINE bool any(Vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__) && !defined(GEMMA_EXT_EMULATED_AMX)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

// Fixed order of additions: results do not depend on how rows were dealt to threads.
GEMMA_EXT_INLINE float sum(Vf x) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += x[i];
  return s;
}

GEMMA_EXT_INLINE float max(Vf x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// Nearest-even rounding to bfloat16; a NaN stays a NaN.
GEMMA_EXT_INLINE Vu round_bf16(Vf x) {
  const Vu bits = (Vu)x;
  const Vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : ((bits >> 16) | 0x40);
}

GEMMA_EXT_INLINE void store(bf16* p, Vf x) {
  *reinterpret_cast<VhLoose*>(p) = __builtin_convertvector(round_bf16(x), Vh);
}

GEMMA_EXT_INLINE Vf load(const bf16* p) {
  const Vu wide = __builtin_convertvector(*reinterpret_cast<const VhLoose*>(p), Vu);
  return (Vf)(wide << 16);
}

// e^x within 2 ulp for x <= 88; 0 below -87, so that -inf gives 0; NaN stays NaN.
// Cody-Waite reduction to |r| <= ln(2)/2, then the Taylor polynomial of degree 6 (1.6e-7).
GEMMA_EXT_INLINE Vf exp(Vf x) {
  const Vi tiny = x < -87.0f;
  const Vf clamped = tiny ? set1(-87.0f) : x;
  const float magic = 0x1.8p23f;  // adding it leaves the rounded integer in the low mantissa bits
  const Vf shifted = clamped * 1.44269504f + magic;
  const Vf n = shifted - magic;
  const Vf r = (clamped - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;
  Vf p = r * 1.38888889e-3f + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + (r + 1.0f);
  const Vf scale = (Vf)(((Vi)shifted + 127) << 23);
  return tiny ? Vf{} : p * scale;
}

// tanh x within 2e-7 relative. Below kTanhPoly, the usual case, an odd polynomial of degree 13
// (minimax fit, 9e-8); the exponential form where any lane is larger.
constexpr float kTanhPoly = 0.75f;

GEMMA_EXT_INLINE Vf tanh(Vf x) {
  const Vf y = x * x;
  Vf poly = y * 0.0017059356f + -0.0076093664f;
  poly = poly * y + 0.021424724f;
  poly = poly * y + -0.053885721f;
  poly = poly * y + 0.13332616f;
  poly = poly * y + -0.33333313f;
  poly = poly * (y * x) + x;
  const Vf magnitude = (Vf)((Vi)x & 0x7fffffff);
  const Vi large = ~(magnitude <= kTanhPoly);  // true for NaN too
  if (!any(large)) return poly;
  const Vf doubled = magnitude + magnitude;
  const Vf e = exp(doubled > 40.0f ? set1(40.0f) : doubled);
  const Vf t = 1.0f - 2.0f / (e + 1.0f);
  const Vf signed_t = (Vf)((Vi)t | ((Vi)x & (int32_t)0x80000000));
  return large ? signed_t : poly;
}

}  // namespace gemma_ext::cpu::GEMMA_EXT_ISA
