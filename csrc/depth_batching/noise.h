// SPDX-License-Identifier: Apache-2.0
// Noise of sampling, the same for every engine:  sample = argmax_v s_v / T + g_v,  g = -log(-log(1 - u)),
// u = (word + 1/2) 2^-32, where `word` is word v % 4 of Philox4x32-10 (Salmon et al. 2011) of the key `seed` (its
// low 63 bits) and the counter (v / 4, position, request, request >> 32).
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/random.h"

namespace gemma_ext::depth_batching {

struct NoiseKey {
  uint32_t key0, key1, position, request0, request1;
};

GEMMA_EXT_RANDOM NoiseKey noise_key(const int64_t* seed_request_position) {
  const uint64_t seed = (uint64_t)seed_request_position[0] & 0x7fffffffffffffffu;
  const uint64_t request = (uint64_t)seed_request_position[1];
  return {(uint32_t)seed, (uint32_t)(seed >> 32), (uint32_t)seed_request_position[2],
          (uint32_t)request, (uint32_t)(request >> 32)};
}

// Words of ids 4 quad .. 4 quad + 3.
GEMMA_EXT_RANDOM void noise_words(const NoiseKey& k, uint32_t quad, uint32_t* words) {
  words[0] = quad;
  words[1] = k.position;
  words[2] = k.request0;
  words[3] = k.request1;
  philox_words<WordProduct>(k.key0, k.key1, words);
}

GEMMA_EXT_RANDOM float noise_float(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } u;
  u.bits = bits;
  return u.value;
}
GEMMA_EXT_RANDOM uint32_t noise_bits(float x) {
  union {
    float value;
    uint32_t bits;
  } u;
  u.value = x;
  return u.bits;
}

// Of a positive normal number.
GEMMA_EXT_RANDOM float noise_log(float x) {
  const uint32_t bits = noise_bits(x) - kRootHalf;
  return log_of_parts((float)((int32_t)bits >> 23),
                      noise_float((bits & 0x7fffffu) + kRootHalf) - 1.0f);
}

// g of a word. 1 - u of a small u, where g is large, would lose the bits of u.
GEMMA_EXT_RANDOM float gumbel_of(uint32_t word) {
  const float u = ((float)word + 0.5f) * 0x1p-32f;
  const float rest = ((float)(~word) + 0.5f) * 0x1p-32f;
  const bool small = u < 0.25f;
  const uint32_t bits = noise_bits(rest) - kRootHalf;
  const float e = small ? 0.0f : (float)((int32_t)bits >> 23);
  const float m = small ? -u : noise_float((bits & 0x7fffffu) + kRootHalf) - 1.0f;
  return -noise_log(-log_of_parts(e, m));
}

}  // namespace gemma_ext::depth_batching
