// SPDX-License-Identifier: Apache-2.0
// The unbiased filter: a strip whose share of its row's gradient is u < 1 of tau is computed with
// probability u and weighs 1 / u then, so that gradients are right on average; systematic sampling along
// the row keeps the sum of a row's weights within one strip of tau.
//   x = |a| mass + |q| reach,  u = x / (tau ref);  phase += u 2^32 (mod 2^32), kept where that carries
// Fixed point makes the phases exact, so they may be added up in any order.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define GEMMA_EXT_EVERYWHERE __host__ __device__ __forceinline__
#else
#define GEMMA_EXT_EVERYWHERE inline
#endif

namespace gemma_ext::cce {

// Philox2x32 with ten rounds (Salmon et al. 2011), its first word.
GEMMA_EXT_EVERYWHERE uint32_t philox(uint32_t counter0, uint32_t counter1, uint32_t key) {
  for (int round = 0; round < 10; ++round, key += 0x9E3779B9u) {
    const uint64_t product = uint64_t{0xD256D193u} * counter0;
    counter0 = static_cast<uint32_t>(product >> 32) ^ key ^ counter1;
    counter1 = static_cast<uint32_t>(product);
  }
  return counter0;
}

// The phase before a row's first strip. lse moves with every step of a training, and with it the draw.
GEMMA_EXT_EVERYWHERE uint32_t first_phase(uint32_t row, uint32_t lse_bits, int64_t seed) {
  return philox(row, lse_bits, static_cast<uint32_t>(seed) ^ static_cast<uint32_t>(seed >> 32));
}

// What a strip adds to the phase. 0: it is never computed, or certainly, which is_certain tells apart; NaN
// is certain.
GEMMA_EXT_EVERYWHERE bool is_certain(float u) { return !(u < 1.0f); }
GEMMA_EXT_EVERYWHERE uint32_t phase_step(float u) {
  if (is_certain(u) || !(u > 0.0f)) return 0;
  const uint32_t step = static_cast<uint32_t>(u * 0x1p32f);
  return step > 0 ? step : 1;
}
// `phase` is the one after the strip's step.
GEMMA_EXT_EVERYWHERE bool is_drawn(uint32_t phase, uint32_t step) { return phase < step; }
GEMMA_EXT_EVERYWHERE float draw_weight(uint32_t step) {
  return step ? 0x1p32f / static_cast<float>(step) : 1.0f;
}

// filter_eps = auto: the largest tau of 2^-6 .. 2^-12 whose predicted relative standard error of dE is at
// most 2^-6. A strip that is drawn with probability m / tau adds sum p^2 (tau / m - 1) to the variance, if
// the rows of c are orthogonal and of one length. On a pretrained 270M model (code, English) the prediction was 1.1 times the error of dE, that 1.0 to
// 1.15 times the error of the gradient of all parameters, and 2^-8 was taken: 1.1 % at 2.8 and 3.5 % kept.
constexpr int kCandidates = 7;
constexpr double kAutoEps = -1, kAutoError = 0x1p-6;
GEMMA_EXT_EVERYWHERE double tau_of(double eps, int candidate) {
  return eps == kAutoEps ? 0x1p-6 / (1 << candidate) : eps;
}

// What the filter does with rows of equal upstream gradient.
struct FilterReport {
  double kept = 1, error = 0, tau = 0;
};

// `kept` and `noise` of each candidate summed over the strips; energy: of the gradient.
GEMMA_EXT_EVERYWHERE FilterReport choose_tau(double eps, double break_even, double strips,
                                             const double* kept, const double* noise,
                                             double energy) {
  const bool automatic = eps == kAutoEps;
  for (int i = 0; i < (automatic ? kCandidates : 1); ++i) {
    FilterReport report;
    report.kept = strips > 0 ? kept[i] / strips : 1;
    report.error = energy > 0 ? sqrt(noise[i] / energy) : 0;
    report.tau = tau_of(eps, i);
    if (!automatic) return report;
    if (!(report.error <= kAutoError)) continue;
    if (report.kept > break_even) break;
    return report;
  }
  return {};
}

}  // namespace gemma_ext::cce
