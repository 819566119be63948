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

// What a mask leaves of an octet, a byte for each model; kM bounds their number, 0 does not.
template <int kM>
class KeptBytes {
 public:
  DEVICE KeptBytes(const MergeCommon& p, const MaskShared& s, const Chunk& k, const Octet& o)
      : masked_(p.mask.any()) {
    NO_UNROLL
    for (int m = 0; masked_ && m < k.models; ++m) {
      const unsigned kept = kept_of(p.plan, p.mask, s, k, m, o);
      if constexpr (kM > 0) {
        bytes_ ^= uint64_t{kept ^ 0xffu} << (8 * m);
      } else {
        array_[m] = static_cast<uint8_t>(kept);
      }
    }
  }
  DEVICE unsigned of(int m) const {
    if constexpr (kM > 0) {
      return static_cast<unsigned>(bytes_ >> (8 * m)) & 0xff;
    } else {
      return masked_ ? array_[m] : 0xffu;
    }
  }

 private:
  bool masked_;
  uint64_t bytes_ = ~uint64_t{0};
  uint8_t array_[kM > 0 ? 1 : kMaxModels];
};

// The terms of an octet, and who agrees. kRescales: survivors may be divided by what marks say.
template <class A, int kM, bool kRescales>
class Ballot {
  const MergeCommon& p_;
  const Rule& rule_;
  const MergeShared<A>& s_;
  const Chunk& k_;
  const Octet& o_;
  KeptBytes<kM> kept_;  // before the deltas: little else is live while they are found

 public:
  Deltas<A, kM> deltas;
  A sign[kLanes] = {};  // elected, where there is an election
  unsigned nan = 0;

  DEVICE Ballot(const MergeCommon& p, const Rule& rule, const MergeShared<A>& s, const Chunk& k,
                const Octet& o)
      : p_(p), rule_(rule), s_(s), k_(k), o_(o), kept_(p, s.mask, k, o), deltas(k, o) {
    const bool elects = rule.election != Election::kNone;
    const A* coefficients = rule.weighted ? s.coefficients.weighted : s.coefficients.plain;
    each_model<kM>(k.models, [&](int m) {
      const A(&d)[kLanes] = deltas.of(m);
      UNROLL
      for (int j = 0; j < kLanes; ++j) nan |= static_cast<unsigned>(d[j] != d[j]) << j;
      if (!elects) return;
      A x[kLanes];
      terms(m, d, kept_.of(m), coefficients[m], x);
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
    const unsigned mine = kept_.of(m);
    terms(m, d, mine, s_.coefficients.weighted[m], x);
    if (rule_.election == Election::kNone) return mine;
    A votes[kLanes];
    if (!rule_.weighted) terms(m, d, mine, s_.coefficients.plain[m], votes);
    unsigned agree = 0;
    UNROLL
    for (int j = 0; j < kLanes; ++j)
      agree |= static_cast<unsigned>(agrees(rule_.weighted ? x[j] : votes[j], sign[j])) << j;
    return agree;
  }

 private:
  DEVICE void terms(int m, const A (&d)[kLanes], unsigned mine, A coefficient,
                    A (&x)[kLanes]) const {
    UNROLL
    for (int j = 0; j < kLanes; ++j) x[j] = term(mine >> j & 1, coefficient, d[j]);
    if (!kRescales || !p_.mask.rescale) return;
    const float* marks = marks_of(p_.mask, k_, m, o_);
    UNROLL
    for (int j = 0; j < kLanes; ++j)
      if (o_.has(j)) x[j] = mine >> j & 1 ? x[j] / static_cast<A>(marks[j]) : A{0};
  }
};

}  // namespace gemma_ext::souping::cuda
