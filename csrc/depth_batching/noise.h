// SPDX-License-Identifier: Apache-2.0
// Noise of sampling, the same for every engine:  sample = argmax_v s_v / T + g_v,  g = -log(-log(1 - u)),
// u = (word + 1/2) 2^-32, where `word` is word v % 4 of Philox4x32-10 (Salmon et al. 2011) of the key `seed` (its
// low 63 bits) and the counter (v / 4, position, request, request >> 32).
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define DEPTH_NOISE static __host__ __device__ __forceinline__
#else
// internal linkage: compiled once per instruction set
#define DEPTH_NOISE static inline __attribute__((always_inline, unused))
#endif

namespace gemma_ext::depth_batching {

struct NoiseKey {
  uint32_t key0, key1, position, request0, request1;
};

DEPTH_NOISE NoiseKey noise_key(const int64_t* seed_request_position) {
  const uint64_t seed = (uint64_t)seed_request_position[0] & 0x7fffffffffffffffu;
  const uint64_t request = (uint64_t)seed_request_position[1];
  return {(uint32_t)seed, (uint32_t)(seed >> 32), (uint32_t)seed_request_position[2],
          (uint32_t)request, (uint32_t)(request >> 32)};
}

// Words of ids 4 quad .. 4 quad + 3.
DEPTH_NOISE void noise_words(const NoiseKey& k, uint32_t quad, uint32_t* words) {
  uint32_t c0 = quad, c1 = k.position, c2 = k.request0, c3 = k.request1;
  uint32_t k0 = k.key0, k1 = k.key1;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = (uint64_t)c0 * 0xD2511F53u, q = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(q >> 32) ^ c1 ^ k0;
    c2 = (uint32_t)(p >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)q;
    c3 = (uint32_t)p;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

DEPTH_NOISE float noise_float(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } u;
  u.bits = bits;
  return u.value;
}
DEPTH_NOISE uint32_t noise_bits(float x) {
  union {
    float value;
    uint32_t bits;
  } u;
  u.value = x;
  return u.bits;
}

// log of 2^e (1 + m), m in [sqrt(1/2) - 1, sqrt(2) - 1), within 2e-7 relative (the polynomial of Cephes' logf).
DEPTH_NOISE float noise_log(float e, float m) {
  const float z = m * m;
  float p = 7.0376836292e-2f * m + -1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m + -1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m + -1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m + -2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z;
  p = p + e * -2.12194440e-4f;
  p = p + z * -0.5f;
  return (m + p) + e * 0.693359375f;
}

// Of a positive normal number.
DEPTH_NOISE float noise_log(float x) {
  const uint32_t bits = noise_bits(x) - 0x3f3504f3u;  // of sqrt(1/2)
  return noise_log((float)((int32_t)bits >> 23),
                   noise_float((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f);
}

// g of a word. 1 - u of a small u, where g is large, would lose the bits of u.
DEPTH_NOISE float gumbel_of(uint32_t word) {
  const float u = ((float)word + 0.5f) * 0x1p-32f;
  const float rest = ((float)(~word) + 0.5f) * 0x1p-32f;
  const bool small = u < 0.25f;
  const uint32_t bits = noise_bits(rest) - 0x3f3504f3u;
  const float e = small ? 0.0f : (float)((int32_t)bits >> 23);
  const float m = small ? -u : noise_float((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
  return -noise_log(-noise_log(e, m));
}

}  // namespace gemma_ext::depth_batching
