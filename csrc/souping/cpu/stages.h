// SPDX-License-Identifier: Apache-2.0
// The ends of every kernel: elements into float buffers that stay in L1, random words, results out.
#pragma once

#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../../common/cpu/vec.h"
#include "../element.h"
#include "kernels.h"

namespace gemma_ext::souping::GEMMA_EXT_ISA {
namespace {

// A merge of 3 models has a dozen float buffers of a step: 24 KiB of a 32 KiB L1.
constexpr int kStep = 512;

using gemma_ext::cpu::GEMMA_EXT_ISA::kLanes;
using gemma_ext::cpu::GEMMA_EXT_ISA::Vu;

template <class T>
T* scratch(Scratch& s, Slot slot, int64_t count) {
  return static_cast<T*>(s.part(slot, count * sizeof(T)));
}

// n elements as float: in place where they are, else in `to`; null where there are none.
inline const float* widen(const Array& a, int64_t at, int n, float* __restrict to) {
  if (!a.data) return nullptr;
  if (a.type == DType::kFloat32) return static_cast<const float*>(a.data) + at;
  const uint16_t* __restrict from = static_cast<const uint16_t*>(a.data) + at;
  if (a.type == DType::kBFloat16)
    for (int i = 0; i < n; ++i) to[i] = bf16_to_float(from[i]);
  else
    for (int i = 0; i < n; ++i) to[i] = half_to_float(from[i]);
  return to;
}

// The upper words of a * b.
inline Vu multiply_high(uint32_t a, Vu b) {
#if defined(__AVX512F__)
  typedef uint64_t Pairs __attribute__((vector_size(64)));
  const __m512i factor = _mm512_set1_epi32(int(a)), odd = (__m512i)((Pairs)b >> 32);
  const Vu low = (Vu)((Pairs)_mm512_maskz_mul_epu32(0xff, (__m512i)b, factor) >> 32);
  const Vu high = (Vu)_mm512_maskz_mul_epu32(0xff, odd, factor);
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(int(a)), odd = _mm256_srli_epi64((__m256i)b, 32);
  const Vu low = (Vu)_mm256_srli_epi64(_mm256_mul_epu32((__m256i)b, factor), 32);
  const Vu high = (Vu)_mm256_mul_epu32(odd, factor);
#elif defined(__SSE2__) && !defined(GEMMA_EXT_EMULATED_AMX)
  const __m128i factor = _mm_set1_epi32(int(a)), odd = _mm_srli_epi64((__m128i)b, 32);
  const Vu low = (Vu)_mm_srli_epi64(_mm_mul_epu32((__m128i)b, factor), 32);
  const Vu high = (Vu)_mm_mul_epu32(odd, factor);
#else
  Vu found;
  for (int i = 0; i < kLanes; ++i) found[i] = uint32_t(uint64_t(a) * b[i] >> 32);
  return found;
#endif
#if defined(__SSE2__) && !defined(GEMMA_EXT_EMULATED_AMX)
  Vu upper;
  for (int i = 0; i < kLanes; ++i) upper[i] = i % 2 ? ~0u : 0u;
  return (high & upper) | low;
#endif
}

// philox of kLanes quads that agree in their upper words.
inline void philox_lanes(uint64_t key, uint64_t quad, uint32_t model, uint32_t purpose,
                         uint32_t* __restrict words) {
  Vu c0 = Vu{} + uint32_t(quad), c1 = Vu{} + uint32_t(quad >> 32);
  Vu c2 = Vu{} + model, c3 = Vu{} + purpose;
  for (int i = 0; i < kLanes; ++i) c0[i] += uint32_t(i);
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Vu p = multiply_high(0xD2511F53u, c0), q = multiply_high(0xCD9E8D57u, c2);
    const Vu low_p = c0 * 0xD2511F53u, low_q = c2 * 0xCD9E8D57u;
    c0 = q ^ c1 ^ k0;
    c2 = p ^ c3 ^ k1;
    c1 = low_q;
    c3 = low_p;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  alignas(64) uint32_t found[4][kLanes];
  const Vu all[4] = {c0, c1, c2, c3};
  memcpy(found, all, sizeof(found));
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) words[4 * i + j] = found[j][i];
}

// Random words of positions at .. at + n; `words` holds kWordRoom.
constexpr int kWordRoom = kStep + 4 * kLanes + 4;

inline const uint32_t* random_words(uint64_t key, uint32_t model, Purpose purpose, int64_t at,
                                    int n, uint32_t* __restrict words) {
  const uint64_t first = uint64_t(at / 4);
  const int skip = int(at % 4), quads = (skip + n + 3) / 4;
  if (first >> 32 != (first + quads + kLanes) >> 32) {
    for (int q = 0; q < quads; ++q) philox(key, first + q, model, purpose, words + 4 * q);
    return words + skip;
  }
  for (int q = 0; q < quads; q += kLanes)
    philox_lanes(key, first + q, model, purpose, words + 4 * q);
  return words + skip;
}

// Past the caches, for results that are too large to be found there: without reading their lines first.
inline void stream_bytes(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  const int64_t head = least(-reinterpret_cast<intptr_t>(to) & 63, bytes);
  memcpy(to, from, head);
  int64_t i = head;
#if defined(__AVX512F__)
  for (; i + 64 <= bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX2__)
  for (; i + 32 <= bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
  for (; i + 16 <= bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
  memcpy(to + i, from + i, bytes - i);
#else
  memcpy(to, from, bytes);
#endif
}

// Streamed results are visible to other threads after it.
inline void end_stream(bool stream) {
#if defined(__SSE2__)
  if (stream) _mm_sfence();
#else
  (void)stream;
#endif
}

// n elements as they are stored.
inline void put(const Array& out, int64_t at, int n, const void* from, bool stream) {
  const int64_t size = size_of(out.type);
  char* to = static_cast<char*>(const_cast<void*>(out.data)) + at * size;
  if (stream)
    stream_bytes(to, static_cast<const char*>(from), n * size);
  else
    memcpy(to, from, n * size);
}

// n <= kStep results; `words` where they are rounded by chance.
template <class A>
void store(const Array& out, int64_t at, int n, const A* __restrict value,
           const uint32_t* __restrict words, bool stream) {
  alignas(64) uint16_t narrow[kStep];
  alignas(64) float single[kStep];
  const void* from = narrow;
  if (out.type == DType::kFloat32) {
    for (int i = 0; i < n; ++i) single[i] = round_float(float(value[i]));
    from = single;
  } else if (out.type == DType::kBFloat16) {
    if (words)
      for (int i = 0; i < n; ++i) narrow[i] = stochastic_bf16(float(value[i]), words[i]);
    else
      for (int i = 0; i < n; ++i) narrow[i] = round_bf16(to_odd(value[i]));
  } else {
    if (words)
      for (int i = 0; i < n; ++i) narrow[i] = stochastic_half(float(value[i]), words[i]);
    else
      for (int i = 0; i < n; ++i) narrow[i] = round_half(to_odd(value[i]));
  }
  put(out, at, n, from, stream);
}

// Words for the rounding of a step, or null.
inline const uint32_t* rounding_words(Rounding rounding, const Array& out, const Part& part,
                                      int64_t at, int n, Scratch& s) {
  if (rounding != Rounding::kStochastic || out.type == DType::kFloat32) return nullptr;
  return random_words(part.key, 0, kRound, part.offset + at, n,
                      scratch<uint32_t>(s, kWords, kWordRoom));
}

// Calls step(at, n) for runs of at most kStep.
template <class Step>
void in_steps(const Run& run, Step step) {
  for (int64_t at = run.begin, end = run.begin + run.count; at < end; at += kStep)
    step(at, int(least(kStep, end - at)));
}

// Difference x_m - base of a step, in `to`, which holds 2 kStep, or in place.
inline const float* delta_of(const Table& t, int64_t part, int m, int64_t at, int n,
                             float* __restrict to) {
  const float* x = widen(t.source[part * t.models + m], at, n, to);
  const float* __restrict base = widen(t.base[part], at, n, to + kStep);
  if (!base) return x;
  for (int i = 0; i < n; ++i) to[i] = x[i] - base[i];
  return to;
}

// Differences x_m - base of a step, the sources where there is no base.
template <class A>
struct Deltas {
  const A* at[kMaxModels];
  const float* base;

  Deltas(const Table& t, int64_t part, int64_t begin, int n, Scratch& s) {
    A* to = scratch<A>(s, kInputs, (t.models + 2) * kStep);
    float* spare = reinterpret_cast<float*>(to + t.models * kStep);
    const float* __restrict below = base = widen(t.base[part], begin, n, spare);
    for (int m = 0; m < t.models; ++m, to += kStep) {
      float* room = spare + kStep;
      if constexpr (sizeof(A) == sizeof(float)) room = to;
      const float* x = widen(t.source[part * t.models + m], begin, n, room);
      if (below)
        for (int i = 0; i < n; ++i) to[i] = A(x[i]) - A(below[i]);
      else if (x != static_cast<const void*>(to))
        for (int i = 0; i < n; ++i) to[i] = A(x[i]);
      at[m] = to;
    }
  }
};

}  // namespace
}  // namespace gemma_ext::souping::GEMMA_EXT_ISA
