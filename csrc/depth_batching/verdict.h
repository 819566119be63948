// SPDX-License-Identifier: Apache-2.0
// What the sums of a row's bounds prove: the last step of the shortlist, for both engines.
#pragma once

#include <math.h>

#include "head.h"

namespace gemma_ext::depth_batching {

// Sums of exp(s - base): over all upper and all lower bounds, over the candidates' upper bounds and their logits.
struct BoundSums {
  double base, high, low, of_high, known;
};

// `first`: the best of the candidates; `others`: what no other upper bound is above, -inf if there is none.
GEMMA_EXT_DEPTH_EXIT static inline void judge(const Shortlist& call, int64_t row, float first,
                                              float others, const BoundSums& sums) {
  // of sums of exp(s) in float, and of s by tanh: 2e-7 of the cap either way
  const double error = 0x1p-18 + call.head.cap * 0x1p-20;
  // a bound that is NaN took no part in the comparisons
  const bool lost = sums.high != sums.high, none = others == -__builtin_huge_valf();
  call.rest[row] = lost ? float(sums.high) : none ? others : float(others + error);
  // at most what the others' upper bounds leave; at least the candidates, and at least all lower bounds
  const double left = sums.high * (1 + error) - sums.of_high * (1 - error);
  const double least = sums.low * (1 - error);
  const double above = sums.base - first + log(sums.known + (left < 0 ? 0 : left));
  const double below = sums.base - first + log(sums.known < least ? least : sums.known);
  call.high[row] = float(above + error + fabs(above) * 0x1p-23);
  call.low[row] = float(below - error - fabs(below) * 0x1p-23);
}

}  // namespace gemma_ext::depth_batching
