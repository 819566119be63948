// SPDX-License-Identifier: Apache-2.0
// Divergence of a student's head from a teacher's: what the binding hands to either engine. With q = softmax of
// the student's scores s, p = softmax of the teacher's t, h as below and G = dloss/d(e.c) of the student,
//   G[n, v] = (w (q a + d g) - b 1{v = label}) ds/da,  g = q - p  or  q (h - sum q h)
//   reverse KL  h = log(q / p),   JSD  h = (1 - beta) log(q / m), m = beta p + (1 - beta) q,   TVD  h = sign(q - p) / 2
// where a, b come from nll and lse, d is the upstream gradient of the divergence and w the weight of the
// strip's draw.
#pragma once

#include "contract.h"

namespace gemma_ext::cce {

enum class Kind : int { kForwardKl, kReverseKl, kJsd, kTvd };

// Kinds that ask for both lse before they can be summed: a second pass over both heads.
GEMMA_EXT_EVERYWHERE constexpr bool needs_lse(Kind kind) { return kind == Kind::kJsd || kind == Kind::kTvd; }

// Sums of squares that cancel are off by a few roundings of their terms.
constexpr double kPairRounding = 1e-6;

// One N, V and one list of targets; D and, of an engine that can, the dtype are their own.
struct TwoHeads {
  Head student, teacher;
  Kind kind;
  float beta;  // of JSD, in (0, 1)
};

// [N] each, at the rows of e; zero in ignored rows. lse + low to twice the bits.
struct DivergenceRows {
  float *divergence, *nll, *lse, *teacher_nll;
  float *lse_low, *teacher_lse, *teacher_low;
  float* mean;  // sum q h; 0 of forward KL
  float* size;  // bound of sum_v |g|
};

struct DivergenceForward {
  TwoHeads heads;
  DivergenceRows out;
  // What the filter draws by, or null: [2, tiles, N], sum q of the strip without the label and a bound of
  // its sum |g|; of compact rows, zero behind the last.
  float* masses;
  double* summary;  // as Forward's, of the divergence alone
  double eps;
};

struct DivergenceBackward {
  TwoHeads heads;
  DivergenceRows rows;  // of the forward
  const float *d_divergence, *d_nll, *d_lse;
  const float* masses;
  const double* summary;  // null keeps every strip
  int64_t seed;
  Gradients out;
};

}  // namespace gemma_ext::cce
