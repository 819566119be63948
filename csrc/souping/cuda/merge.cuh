// SPDX-License-Identifier: Apache-2.0
// Terms of an octet, and how the models vote over them.
#pragma once

#include "mask.cuh"

namespace gemma_ext::souping::cuda {

struct Numbers {
  const double *weights, *divide, *alone;  // [T, M]
};

// Of a chunk's part, in shared memory.
template <class A>
struct Coefficients {
  A weight[kMaxModels], alone[kMaxModels];
  A weighted[kMaxModels], plain[kMaxModels];  // of a term, of a vote without weights

  DEVICE void fill(const Numbers& n, const Chunk& k) {
    for (int m = simt::thread_idx(); m < k.models; m += simt::block_dim()) {
      const int64_t at = k.number * k.models + m;
      weight[m] = static_cast<A>(n.weights[at]);
      weighted[m] = static_cast<A>(n.weights[at] / n.divide[at]);
      plain[m] = static_cast<A>(1 / n.divide[at]);
      alone[m] = n.alone ? static_cast<A>(n.alone[at]) : A{1};
    }
  }
};

struct MergeCommon {
  Plan plan;
  Range chunks;
  Rule rule;
  MaskPlan mask;
  Numbers numbers;
};

template <class A>
struct MergeShared {
  View views[2 * kMaxModels + 2];
  MaskShared mask;
  Coefficients<A> coefficients;
  Word dealt;
};

// The terms of an octet, and who agrees. Masks of up to kM models are found first, a byte each: in a loop, for they
// are long. kRescales: survivors may be divided by what marks say.
template <class A, int kM, bool kRescales>
class Ballot {
 public:
  Deltas<A, kM> deltas;
  A sign[kLanes] = {};  // elected, where there is an election
  unsigned nan = 0;

  DEVICE Ballot(const MergeCommon& p, const Rule& rule, const MergeShared<A>& s, const Chunk& k,
                const Octet& o)
      : deltas(k, o), p_(p), rule_(rule), s_(s), k_(k), o_(o) {
    if constexpr (kM > 0) {
      NO_UNROLL
      for (int m = 0; p.mask.any() && m < k.models; ++m)
        kept_ ^= uint64_t{find_kept(m) ^ 0xffu} << (8 * m);
    }
    const bool elects = rule.election != Election::kNone;
    const A* coefficients = rule.weighted ? s.coefficients.weighted : s.coefficients.plain;
    each_model<kM>(k.models, [&](int m) {
      const A(&d)[kLanes] = deltas.of(m);
      UNROLL
      for (int j = 0; j < kLanes; ++j) nan |= static_cast<unsigned>(d[j] != d[j]) << j;
      if (!elects) return;
      A x[kLanes];
      terms(m, d, kept(m), coefficients[m], x);
      UNROLL
      for (int j = 0; j < kLanes; ++j) sign[j] = sign[j] + vote(rule.election, x[j]);
    });
    if (!elects) return;
    UNROLL
    for (int j = 0; j < kLanes; ++j) sign[j] = elected_sign(sign[j], rule.zero);
  }

  // Terms of model m, a bit for each where it agrees.
  DEVICE unsigned of(int m, A (&x)[kLanes]) {
    const A(&d)[kLanes] = deltas.of(m);
    const unsigned mine = kept(m);
    terms(m, d, mine, s_.coefficients.weighted[m], x);
    if (rule_.election == Election::kNone) return mine;
    A votes[kLanes];
    if (!rule_.weighted) terms(m, d, mine, s_.coefficients.plain[m], votes);
    unsigned agree = 0;
    UNROLL
    for (int j = 0; j < kLanes; ++j)
      agree |= static_cast<unsigned>(agrees(true, rule_.weighted ? x[j] : votes[j], sign[j])) << j;
    return agree;
  }

 private:
  DEVICE unsigned find_kept(int m) const { return kept_of(p_.plan, p_.mask, s_.mask, k_, m, o_); }
  DEVICE unsigned kept(int m) const {
    if constexpr (kM > 0) return static_cast<unsigned>(kept_ >> (8 * m)) & 0xff;
    return p_.mask.any() ? find_kept(m) : 0xff;
  }
  DEVICE void terms(int m, const A (&d)[kLanes], unsigned mine, A coefficient,
                    A (&x)[kLanes]) const {
    UNROLL
    for (int j = 0; j < kLanes; ++j) x[j] = term<A>(mine >> j & 1, coefficient, d[j]);
    if (!kRescales || !p_.mask.rescale) return;
    const float* marks = marks_of(p_.mask, k_, m, o_);
    UNROLL
    for (int j = 0; j < kLanes; ++j)
      if (o_.has(j)) x[j] = mine >> j & 1 ? x[j] / static_cast<A>(marks[j]) : A{0};
  }

  const MergeCommon& p_;
  const Rule& rule_;
  const MergeShared<A>& s_;
  const Chunk& k_;
  const Octet& o_;
  uint64_t kept_ = ~uint64_t{0};
};

}  // namespace gemma_ext::souping::cuda
