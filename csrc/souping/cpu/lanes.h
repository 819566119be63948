// SPDX-License-Identifier: Apache-2.0
// kLanes elements at once: what element.h's templates take in place of single numbers.
#pragma once

#include "stages.h"

namespace gemma_ext::souping::GEMMA_EXT_ISA {
namespace {

using gemma_ext::cpu::GEMMA_EXT_ISA::Vf;
using gemma_ext::cpu::GEMMA_EXT_ISA::VfLoose;
using gemma_ext::cpu::GEMMA_EXT_ISA::Vh;
using gemma_ext::cpu::GEMMA_EXT_ISA::VhLoose;
using gemma_ext::cpu::GEMMA_EXT_ISA::Vi;
using gemma_ext::cpu::GEMMA_EXT_ISA::VuLoose;

static_assert(kStep % kLanes == 0);

typedef double Vd __attribute__((vector_size(kLanes * 8)));
typedef int64_t Vl __attribute__((vector_size(kLanes * 8)));
typedef double VdLoose __attribute__((vector_size(kLanes * 8), aligned(8), may_alias));
typedef uint8_t Vb __attribute__((vector_size(kLanes)));
typedef uint8_t VbLoose __attribute__((vector_size(kLanes), aligned(1), may_alias));

template <class A>
struct Lane;

template <>
struct Lane<float> {
  typedef Vf V;
  typedef Vi K;
  static GEMMA_EXT_INLINE V from(Vf x) { return x; }
};

template <>
struct Lane<double> {
  typedef Vd V;
  typedef Vl K;
  static GEMMA_EXT_INLINE V from(Vf x) { return __builtin_convertvector(x, Vd); }
};

template <class A>
using V = typename Lane<A>::V;
template <class A>
using K = typename Lane<A>::K;

// gcc 12 takes __builtin_convertvector apart into single elements where one instruction would do, and warns of its
// own headers where that has no mask.
[[maybe_unused]] constexpr uint16_t kAll = 0xffff;
GEMMA_EXT_INLINE Vu widen_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Vu)_mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (Vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const VbLoose*>(p), Vu);
#endif
}
GEMMA_EXT_INLINE Vu widen_halves(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Vu)_mm512_maskz_cvtepu16_epi32(kAll,
                                         _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const VhLoose*>(p), Vu);
#endif
}
// The lower halves.
GEMMA_EXT_INLINE void put_halves(uint16_t* p, Vu x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(kAll, (__m512i)x));
#else
  *reinterpret_cast<VhLoose*>(p) = __builtin_convertvector(x, Vh);
#endif
}

GEMMA_EXT_INLINE Vf load_floats(const float* p) { return *reinterpret_cast<const VfLoose*>(p); }
GEMMA_EXT_INLINE Vf load_bf16(const uint16_t* p) { return (Vf)(widen_halves(p) << 16); }
template <class A>
GEMMA_EXT_INLINE K<A> load_mask(const uint8_t* p) {
  const Vi mask = widen_bytes(p) != 0;
  if constexpr (sizeof(A) == sizeof(float))
    return mask;
  else
    return __builtin_convertvector(mask, Vl);
}

// Elements of a step: as float in a buffer, or as bfloat16 where they lie.
template <bool kBf16>
GEMMA_EXT_INLINE Vf load_elements(const void* from, int i) {
  if constexpr (kBf16)
    return load_bf16(static_cast<const uint16_t*>(from) + i);
  else
    return load_floats(static_cast<const float*>(from) + i);
}

// The models and the base of a step.
struct Inputs {
  const void* source[kMaxModels];
  const void* base;  // or null
  bool bf16;         // else float

  Inputs() = default;
  // `whole`: vectors begin at multiples of kLanes only
  Inputs(const Table& t, int64_t part, int64_t at, int n, bool whole, Scratch& s) {
    const Array *from = t.source + part * t.models, &below = t.base[part];
    bf16 = whole && n == kStep && (!below.data || below.type == DType::kBFloat16);
    for (int m = 0; m < t.models; ++m) bf16 &= from[m].type == DType::kBFloat16;
    float* to = bf16 ? nullptr : scratch<float>(s, kInputs, (t.models + 1) * kStep + kLanes);
    const auto read = [&](const Array& a) -> const void* {
      if (bf16 && a.data) return static_cast<const uint16_t*>(a.data) + at;
      if (!a.data) return nullptr;
      // into the buffer even where they are float: whole vectors are read
      const float* found = widen(a, at, n, to);
      if (found != to) memcpy(to, found, n * sizeof(float));
      memset(to + n, 0, (kStep - n) * sizeof(float));
      to += kStep;
      return to - kStep;
    };
    base = read(below);
    for (int m = 0; m < t.models; ++m) source[m] = read(from[m]);
  }
};

// x_m - base, or x_m.
template <class A, bool kBf16>
GEMMA_EXT_INLINE V<A> load_delta(const Inputs& in, int m, int i, V<A> base) {
  const V<A> x = Lane<A>::from(load_elements<kBf16>(in.source[m], i));
  return in.base ? x - base : x;
}
template <class A, bool kBf16>
GEMMA_EXT_INLINE V<A> load_base(const Inputs& in, int i) {
  return in.base ? Lane<A>::from(load_elements<kBf16>(in.base, i)) : V<A>{};
}

GEMMA_EXT_INLINE void put_lanes(float* to, int i, Vf x) { *reinterpret_cast<VfLoose*>(to + i) = x; }
GEMMA_EXT_INLINE void put_lanes(double* to, int i, Vd x) {
  *reinterpret_cast<VdLoose*>(to + i) = x;
}
// As round_bf16.
GEMMA_EXT_INLINE void put_lanes(uint16_t* to, int i, Vf x) {
  const Vu bits = (Vu)x, up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vu rounded = x == x ? up : Vu{} + (kNan >> 16);
  put_halves(to + i, rounded);
}

GEMMA_EXT_INLINE void put_keys(uint32_t* keys, int i, Vf x) {
  const Vu bits = (Vu)x & ~kSign;  // as magnitude
  *reinterpret_cast<VuLoose*>(keys + i) = bits > kInfinite ? Vu{} + kNoKey : bits;
}

// Keys of a step, whole vectors of them: of one model,
template <bool kBf16>
void delta_keys(const Inputs& in, int m, int n, uint32_t* __restrict keys) {
  for (int i = 0; i < n; i += kLanes)
    put_keys(keys, i, load_delta<float, kBf16>(in, m, i, load_base<float, kBf16>(in, i)));
}
// and of the variance over kM models, 0: any number.
template <bool kBf16, int kM>
void variance_keys(const Inputs& in, int models, int n, uint32_t* __restrict keys) {
  Vf d[kM ? kM : kMaxModels];
  for (int i = 0; i < n; i += kLanes) {
    const Vf base = load_base<float, kBf16>(in, i);
#pragma GCC unroll 4
    for (int m = 0; m < (kM ? kM : models); ++m) d[m] = load_delta<float, kBf16>(in, m, i, base);
    put_keys(keys, i, variance<kM>(d, models));
  }
}
template <bool kBf16>
void variance_keys(const Inputs& in, int models, int n, uint32_t* keys) {
  switch (models) {
    case 2: return variance_keys<kBf16, 2>(in, models, n, keys);
    case 3: return variance_keys<kBf16, 3>(in, models, n, keys);
    case 4: return variance_keys<kBf16, 4>(in, models, n, keys);
    default: return variance_keys<kBf16, 0>(in, models, n, keys);
  }
}

inline void keys_of(const Inputs& in, int models, bool by_variance, int stream, int n,
                    uint32_t* keys) {
  if (by_variance)
    in.bf16 ? variance_keys<true>(in, models, n, keys) : variance_keys<false>(in, models, n, keys);
  else
    in.bf16 ? delta_keys<true>(in, stream, n, keys) : delta_keys<false>(in, stream, n, keys);
}

}  // namespace
}  // namespace gemma_ext::souping::GEMMA_EXT_ISA
