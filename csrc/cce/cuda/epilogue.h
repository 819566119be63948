// SPDX-License-Identifier: Apache-2.0
// From a tile of products e.c to logits, while they are in registers.
#pragma once

#include "common/cuda/tile_mma.h"
#include "launches.h"

namespace gemma_ext::cce::cuda {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

DEVICE float exp_of(float x) { return simt::exp2_approx(x * kLog2E); }

// c tanh(u) by the odd minimax polynomial on [-1, 1] (Remez exchange; |error| <= 1.5e-7 c in fp32), with c in
// the coefficients.
struct SmallTanh {
  float coefficient[7];

  HOST_DEVICE explicit SmallTanh(float c)
      : coefficient{c * 0.999999702f,  c * -0.333321303f,   c * 0.133195832f,   c * -0.0532658361f,
                    c * 0.0199732836f, c * -0.00595128071f, c * 0.000963772298f} {}

  DEVICE float operator()(float u) const {
    const float t = u * u;
    float p = coefficient[6];
    UNROLL
    for (int i = 5; i >= 0; --i) p = p * t + coefficient[i];
    return u * p;
  }
};
DEVICE float tanh_any(float u) {
  return 1.0f - 2.0f * simt::rcp_approx(1.0f + simt::exp2_approx(2.0f * kLog2E * u));
}

// Outside the vocabulary, in place of s or s log2(e): 2^-1000 below the least logit. Not -inf, for its square
// takes part in the slope; without a cap, where a logit may be -inf itself, there is no such square.
DEVICE float outside(const LogitMap& map) {
  return map.inv_cap > 0.0f ? -1000.0f - kLog2E * map.cap_over_t : -kInfinity;
}

// ds/da at the logit s.
DEVICE float slope_at(const LogitMap& map, float s) {
  const float t = s * map.t_over_cap;
  return (1.0f - t * t) * map.inv_t;
}

// s in place of e.c; -inf where the column is outside the vocabulary (s_column < 0).
template <class T>
DEVICE void logits(mma::Tile<T>& tile, const LogitMap& map, const float* s_bias,
                   const int* s_column, bool whole) {
  float largest = 0.0f;
  const float unit = map.inv_cap > 0.0f ? map.inv_cap : map.inv_t;
  tile.each([&](int, int column, float& x) {
    x = (x * map.scale + s_bias[column]) * unit;
    largest = fmaxf(largest, fabsf(x));
  });
  if (map.inv_cap > 0.0f) {
    if (simt::any(largest > 1.0f)) {
      tile.each([&](int, int, float& x) { x = tanh_any(x) * map.cap_over_t; });
    } else {
      const SmallTanh tanh(1.0f);
      tile.each([&](int, int, float& x) { x = tanh(x) * map.cap_over_t; });
    }
  }
  if (!whole) {
    tile.each([&](int, int column, float& x) {
      if (s_column[column] < 0) x = -kInfinity;
    });
  }
}

}  // namespace gemma_ext::cce::cuda
