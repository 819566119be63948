// SPDX-License-Identifier: Apache-2.0
// Random words and the logarithm that makes noise of them: the same bits for every engine and family.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define GEMMA_EXT_RANDOM static __host__ __device__ __forceinline__
#else
// internal linkage: compiled once per instruction set
#define GEMMA_EXT_RANDOM static inline __attribute__((always_inline, unused))
#endif

namespace gemma_ext {

constexpr uint32_t kRootHalf = 0x3f3504f3u;  // bits of sqrt(1/2)

// High and low words of products of single numbers.
struct WordProduct {
  GEMMA_EXT_RANDOM void make(uint32_t a, uint32_t by, uint32_t& high, uint32_t& low) {
    const uint64_t product = (uint64_t)a * by;
    high = (uint32_t)(product >> 32);
    low = (uint32_t)product;
  }
};

// Philox4x32-10 (Salmon et al. 2011) of the key (k0, k1): the counter c[0 .. 4) becomes its words. U is uint32_t, or
// a vector of it with a Product of its own.
template <class Product, class U>
GEMMA_EXT_RANDOM void philox_words(uint32_t k0, uint32_t k1, U* c) {
  for (int round = 0; round < 10; ++round) {
    U p_high, p_low, q_high, q_low;
    Product::make(c[0], 0xD2511F53u, p_high, p_low);
    Product::make(c[2], 0xCD9E8D57u, q_high, q_low);
    c[0] = q_high ^ c[1] ^ k0;
    c[2] = p_high ^ c[3] ^ k1;
    c[1] = q_low;
    c[3] = p_low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// log of 2^e (1 + m), m in [sqrt(1/2) - 1, sqrt(2) - 1), within 2e-7 relative (the polynomial of Cephes' logf). A is
// float or a vector of it.
template <class A>
GEMMA_EXT_RANDOM A log_of_parts(A e, A m) {
  const A z = m * m;
  A p = 7.0376836292e-2f * m + -1.1514610310e-1f;
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

}  // namespace gemma_ext
