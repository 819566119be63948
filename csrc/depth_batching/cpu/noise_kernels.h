// SPDX-License-Identifier: Apache-2.0
// The noise of samples, a vector of quads at a time; noise.h has the formulas.
#pragma once

#include "../noise.h"
#include "head_table.h"
#include "rows.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {
namespace {

// Words of the 64-bit products of every lane.
struct LaneProduct {
  static GEMMA_EXT_INLINE void make(Vu a, uint32_t by, Vu& high, Vu& low) {
    const Vu factor = Vu{} + by;
    low = a * factor;
#if defined(__AVX512F__)
    const __m512i x = (__m512i)a, y = (__m512i)factor;
    const __m512i even = _mm512_maskz_srli_epi64(0xff, _mm512_maskz_mul_epu32(0xff, x, y), 32);
    const __m512i odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, x, 32), y);
    high = (Vu)_mm512_mask_mov_epi32(even, 0xaaaa, odd);
#elif defined(__AVX2__) && !defined(GEMMA_EXT_EMULATED_AMX)
    const __m256i x = (__m256i)a, y = (__m256i)factor;
    const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(x, y), 32);
    high = (Vu)_mm256_blend_epi32(even, _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y), 0xaa);
#else
    for (int i = 0; i < kLanes; ++i) high[i] = uint32_t(uint64_t(a[i]) * by >> 32);
#endif
  }
};

// noise_words of kLanes quads from `quad` on: words[i] of the i-th id of each.
GEMMA_EXT_INLINE void noise_words_of(const NoiseKey& k, uint32_t quad, Vu* words) {
  words[0] = (Vu)iota() + quad;
  words[1] = Vu{} + k.position;
  words[2] = Vu{} + k.request0;
  words[3] = Vu{} + k.request1;
  philox_words<LaneProduct>(k.key0, k.key1, words);
}

// A whole number below 2^16 in each half: their sum is rounded once.
GEMMA_EXT_INLINE Vf float_of(Vu x) {
  return __builtin_convertvector((Vi)(x >> 16), Vf) * 0x1p16f +
         __builtin_convertvector((Vi)(x & 0xffffu), Vf);
}
GEMMA_EXT_INLINE Vf exponent_of(Vu shifted) {
  return __builtin_convertvector((Vi)shifted >> 23, Vf);
}
GEMMA_EXT_INLINE Vf mantissa_of(Vu shifted) {
  return (Vf)((shifted & 0x7fffffu) + kRootHalf) - 1.0f;
}

// gumbel_of every lane.
GEMMA_EXT_INLINE Vf gumbels_of(Vu word) {
  const Vf u = (float_of(word) + 0.5f) * 0x1p-32f, rest = (float_of(~word) + 0.5f) * 0x1p-32f;
  const Vi small = u < 0.25f;
  const Vu bits = (Vu)rest - kRootHalf;
  const Vf gap = -log_of_parts(small ? Vf{} : exponent_of(bits), small ? -u : mantissa_of(bits));
  const Vu of_gap = (Vu)gap - kRootHalf;
  return -log_of_parts(exponent_of(of_gap), mantissa_of(of_gap));
}

// Of four vectors, one for each place in a quad: elements T kLanes .. of the quads side by side.
template <int T>
GEMMA_EXT_INLINE Vf quads_of(const Vf* x) {
  return CountLanes<kLanes>::run([&]<int... J>() __attribute__((always_inline)) {
    constexpr int kFirst = T * kLanes / 4;
    const Vf low = __builtin_shufflevector(x[0], x[1], (kFirst + J / 4 + (J % 2 ? kLanes : 0))...);
    const Vf high = __builtin_shufflevector(x[2], x[3], (kFirst + J / 4 + (J % 2 ? kLanes : 0))...);
    return __builtin_shufflevector(low, high, (J % 4 < 2 ? J : kLanes + J)...);
  });
}

void tile_noise(const NoiseKey& key, int64_t id0, float* to) {
  for (int q = 0; q < kTile / 4; q += kLanes, to += 4 * kLanes) {
    Vu words[4];
    Vf noise[4];
    noise_words_of(key, uint32_t(id0 / 4 + q), words);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) noise[i] = gumbels_of(words[i]);
    store(to, quads_of<0>(noise));
    store(to + kLanes, quads_of<1>(noise));
    store(to + 2 * kLanes, quads_of<2>(noise));
    store(to + 3 * kLanes, quads_of<3>(noise));
  }
}

void noise_row(const Noise& call, int64_t row) {
  const NoiseKey key = noise_key(call.keys + 3 * row);
  const int32_t* ids = call.ids + row * call.C;
  for (int64_t c = 0; c < call.C; c += kLanes) {
    const int count = int(least(call.C - c, kLanes));
    Vu words{};
    for (int j = 0; j < count; ++j) {
      uint32_t four[4];
      noise_words(key, uint32_t(ids[c + j]) / 4, four);
      words[j] = four[ids[c + j] % 4];
    }
    put_some(call.out + row * call.C + c, gumbels_of(words), count);
  }
}

}  // namespace
}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
