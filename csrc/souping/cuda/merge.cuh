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
  bool equal;                                 // weights, whose sums then need no order

  DEVICE void fill(const Numbers& n, const Chunk& k) {
    for (int m = simt::thread_idx(); m < k.models; m += simt::block_dim()) {
      const int64_t at = k.number * k.models + m;
      weight[m] = static_cast<A>(n.weights[at]);
      weighted[m] = static_cast<A>(n.weights[at] / n.divide[at]);
      plain[m] = static_cast<A>(1 / n.divide[at]);
      alone[m] = n.alone ? static_cast<A>(n.alone[at]) : A{1};
    }
    if (simt::thread_idx() > 0) return;
    equal = true;
    const double* weights = n.weights + k.number * k.models;
    for (int m = 1; m < k.models; ++m)
      equal &= static_cast<A>(weights[m]) == static_cast<A>(weights[0]);
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
  static constexpr int kRoom = kM > 0 ? kM : kMaxModels;
  Deltas<A, kM> deltas;

  DEVICE Ballot(const MergeCommon& p, const Rule& rule, const MergeShared<A>& s, const Chunk& k,
                const Octet& o)
      : p_(p), rule_(rule), s_(s), k_(k), o_(o), kept_(p, s.mask, k, o), deltas(k, o) {}

  // The elected sign of a position; where a sum elects, `sorted` has the votes in ascending order.
  DEVICE A elected(int j, A (&sorted)[kRoom]) const {
    A total = 0;
    if (rule_.election == Election::kSum) {
      collect_terms<kM>(k_.models, [&](int m) { return vote(m, j); }, sorted);
      total = sum_terms<kM>(sorted, k_.models);
    }
    if (rule_.election == Election::kCount)
      each_model<kM>(k_.models, [&](int m) { total = total + elected_sign(vote(m, j), 0); });
    return elected_sign(total, rule_.zero);
  }

  // What a position's models combine to; NaN where a delta is.
  DEVICE A result(int j, bool has_alone) const {
    const Coefficients<A>& c = s_.coefficients;
    A sorted[kRoom];
    const A sign = elected(j, sorted);
    uint64_t agree = 0;
    bool nan = false;
    Combined<A> held{};
    each_model<kM>(k_.models, [&](int m) {
      const bool mine = rule_.election == Election::kNone ? kept(m, j) : agrees(vote(m, j), sign);
      const A d = deltas.at(m, j);
      nan |= d != d;
      agree |= uint64_t{mine} << m;
      combine(rule_.combine, mine, term_of(m, j, c.weighted), c.alone[m], &held);
    });
    if (rule_.combine != Combine::kMax) {
      if (rule_.election == Election::kSum && rule_.weighted) {
        each_model<kM>(kM > 0 ? kM : k_.models, [&](int m) {
          sorted[m] = agrees(sorted[m], sign) ? sorted[m] : nothing<A>();
        });
        held.value = sum_sorted<kM>(sorted, k_.models);
      } else {
        held.value = sum_models<kM, A>(k_.models, [&](int m) {
          return agree >> m & 1 ? term_of(m, j, c.weighted) : nothing<A>();
        });
      }
    }
    if (rule_.combine == Combine::kWeightedMean) {
      if (c.equal) {
        each_model<kM>(k_.models,
                       [&](int m) { held.weight += agree >> m & 1 ? c.weight[m] : A{0}; });
      } else {
        held.weight = sum_models<kM, A>(k_.models,
                                        [&](int m) { return agree >> m & 1 ? c.weight[m] : A{0}; });
      }
    }
    const A found = combined(rule_.combine, has_alone, held);
    return nan ? static_cast<A>(from_bits(kNan)) : found;
  }

 private:
  DEVICE bool kept(int m, int j) const { return kept_.of(m) >> j & 1; }
  DEVICE A vote(int m, int j) const {
    return term_of(m, j, rule_.weighted ? s_.coefficients.weighted : s_.coefficients.plain);
  }
  DEVICE A term_of(int m, int j, const A* coefficients) const {
    const A x = term(kept(m, j), coefficients[m], deltas.at(m, j));
    if (!kRescales || !p_.mask.rescale || !o_.has(j) || !kept(m, j)) return x;
    return x / static_cast<A>(marks_of(p_.mask, k_, m, o_)[j]);
  }
};

}  // namespace gemma_ext::souping::cuda
