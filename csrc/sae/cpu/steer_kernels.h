// SPDX-License-Identifier: Apache-2.0
// Kernels of steering, token by token.
#pragma once

#include "products_rows.h"

namespace gemma_ext::sae::GEMMA_EXT_ISA {
namespace {

// <x, row i>, x as floats.
inline float dot_row(const Table& t, int64_t i, const float* x, int64_t D) {
  float dot = 0;
  with_type(t.type, [&](auto like) {
    const auto* row = row_of<decltype(like)>(t, i);
    dot_some<1>(x, &row, D, &dot);
  });
  return dot;
}

inline float code_of(const Steer& call, int32_t latent, const float* x) {
  const float p = dot_row(call.encoder, latent, x, call.D) + call.tables[3 * latent];
  return p > call.tables[3 * latent + 1] ? p : 0;
}

inline bool may(const uint8_t* mask, const Steer& call, int64_t b, int64_t t) {
  return !mask || mask[b * call.T + t];
}

inline const float* wide_token(const Steer& call, int64_t b, int64_t t, Scratch& s) {
  float* x = floats_of(s, kRow, call.D);
  widen_row({call.x, call.D, call.type}, b * call.T + t, call.D, x);
  return x;
}

inline bool any_fires(const Steer& call, int64_t b, const float* x) {
  for (int64_t e = call.offsets[b]; e < call.offsets[b + 1]; ++e)
    if (code_of(call, call.latents[e], x) > call.amounts[3 * e + 2]) return true;
  return false;
}

bool fires(const Steer& call, int64_t b, int64_t t, Scratch& s) {
  return may(call.reads, call, b, t) && any_fires(call, b, wide_token(call, b, t, s));
}

// u of an entry; the code is read where its mode or its own gate wants it.
inline float amount_of(const Steer& call, int64_t e, bool own, const float* x) {
  const int32_t latent = call.latents[e], mode = call.modes[e];
  const float level = call.amounts[3 * e + 1], norm = call.tables[3 * latent + 2];
  float f = 0;
  if (own || (mode >= kAblate && mode <= kScale)) f = code_of(call, latent, x);
  if (own && !(f > call.amounts[3 * e + 2])) return 0;
  if (mode == kAdd) return 1;
  if (mode == kAblate) return -f;
  if (mode == kClamp) return level - f;
  if (mode == kMinClamp) return level > f ? level - f : 0;
  if (mode == kScale) return (level - 1) * f;
  const float q = dot_row(call.decoder, latent, x, call.D) / norm;
  if (mode == kProject) return (level - 1) * q / norm;
  return q > level ? (level - q) / norm : 0;
}

void steer(const Steer& call, int64_t b, int64_t t, bool open, Scratch& s) {
  const int64_t row = (b * call.T + t) * call.D * size_of(call.type);
  const char* from = static_cast<const char*>(call.x) + row;
  char* to = static_cast<char*>(call.out) + row;
  const int32_t gate = call.gates[2 * b];
  const bool own = gate == kOwn;
  bool adds = false;
  if (may(call.writes, call, b, t) && open && call.offsets[b] < call.offsets[b + 1]) {
    const float* x = wide_token(call, b, t, s);
    float* out = nullptr;
    open = gate != kTogether || (may(call.reads, call, b, t) && any_fires(call, b, x));
    open = open && (!own || may(call.reads, call, b, t));
    for (int64_t e = call.offsets[b]; open && e < call.offsets[b + 1]; ++e) {
      const float strength = call.amounts[3 * e];
      const float u = strength == 0 ? 0 : strength * amount_of(call, e, own, x);
      if (u == 0) continue;
      if (!adds) {
        out = floats_of(s, kSum, call.D);
        memcpy(out, x, padded_width(call.D) * sizeof(float));
        adds = true;
      }
      with_type(call.decoder.type, [&](auto like) {
        const auto* direction = row_of<decltype(like)>(call.decoder, call.latents[e]);
        add_some<1>(out, &direction, &u, call.D);
      });
    }
    if (adds) store_row(to, call.type, out, call.D);
  }
  if (!adds) memcpy(to, from, call.D * size_of(call.type));
}

}  // namespace
}  // namespace gemma_ext::sae::GEMMA_EXT_ISA
