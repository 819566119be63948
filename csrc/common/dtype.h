// SPDX-License-Identifier: Apache-2.0
// Storage types and their scalar conversions, in forms that compilers vectorise.
#pragma once

#include <stdint.h>
#include <string.h>

namespace gemma_ext {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t size_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }

// Internal linkage throughout: these are compiled for several instruction sets, and the linker must
// not pick one build's copy for all.
static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static inline float bf16_to_float(uint16_t h) { return float_of((uint32_t)h << 16); }

// Nearest-even; a NaN stays a NaN.
static inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
}

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, body = (uint32_t)(h & 0x7fff) << 13;
  // moves the exponent's bias from 15 to 127, which also makes denormals normal
  const uint32_t bits = bits_of(float_of(body) * 0x1p112f);
  return float_of(sign | (body >= 0x0f800000u ? body | 0x7f800000u : bits));
}

static inline uint16_t float_to_half(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) return sign | 0x7e00;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds to 65536 or above
  if (magnitude < 0x38800000u)                         // a denormal half: 0.5 lines up its last bit
    return sign | (uint16_t)(bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u);
  return sign | (uint16_t)((magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000u) >> 13);
}

static inline void load_floats(const void* from, DType t, int64_t n, float* to) {
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  if (t == DType::kFloat32) memcpy(to, from, n * sizeof(float));
  if (t == DType::kBFloat16)
    for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(halves[i]);
  if (t == DType::kFloat16)
    for (int64_t i = 0; i < n; ++i) to[i] = half_to_float(halves[i]);
}

static inline void store_row(void* to, DType t, const float* from, int64_t n) {
  if (t == DType::kFloat32) {
    memcpy(to, from, n * 4);
  } else if (t == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(to)[i] = float_to_bf16(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(to)[i] = float_to_half(from[i]);
  }
}

}  // namespace gemma_ext
