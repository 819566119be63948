// SPDX-License-Identifier: Apache-2.0
// Trim, elect, combine: out = base + scale result.
#pragma once

#include "lanes.h"

namespace gemma_ext::souping::GEMMA_EXT_ISA {
namespace {

template <class A>
struct Numbers {
  A weight[kMaxModels], alone[kMaxModels];
  A weighted[kMaxModels], plain[kMaxModels];  // coefficients of a term, of a vote without weights
  bool equal = true;                          // weights, whose sums then need no order

  Numbers(const double* weights, const double* divide, const double* alones, int models,
          int64_t part) {
    for (int m = 0; m < models; ++m) {
      const int64_t at = part * models + m;
      weight[m] = A(weights[at]);
      equal &= weight[m] == weight[0];
      weighted[m] = A(weights[at] / divide[at]);
      plain[m] = A(1 / divide[at]);
      alone[m] = alones ? A(alones[at]) : A(1);
    }
  }
};

// What all vectors of a step have in common.
template <class A>
struct Step {
  const Inputs& in;
  const Numbers<A>& numbers;
  Rule rule;
  Kept mask;      // ones, [kStep] for all models, where everything is kept
  int64_t place;  // of the step's first element in it
  A scale;
  bool has_alone;
  int models, n;
};

// Rules that are compiled on their own; the last one is whatever a step says.
constexpr Rule kRules[] = {{Election::kNone, true, 1, Combine::kSum},
                           {Election::kSum, true, 1, Combine::kSum},
                           {Election::kSum, true, 1, Combine::kMean},
                           {Election::kSum, true, 1, Combine::kWeightedMean}};
constexpr int kAnyRule = sizeof(kRules) / sizeof(kRules[0]);

// Terms and votes of kLanes elements, and the sign that they elect; kM models, 0: any number.
template <class A, bool kBf16, int kM, int kRule>
struct Ballot {
  static constexpr int kRoom = kM ? kM : kMaxModels;
  V<A> base, sign, x[kRoom], votes[kRoom];
  V<A> sorted[kRoom];  // the votes, where their sum elects
  V<A> bad;  // NaN where a delta is: masks that are joined by & and | gcc 12 takes apart bit by bit
  K<A> kept[kRoom];

  GEMMA_EXT_INLINE Ballot(const Step<A>& s, const Rule& rule, int i) {
    const bool elects = rule.election != Election::kNone;
    base = load_base<A, kBf16>(s.in, i);
    bad = V<A>{};
    V<A> total = V<A>{};
#pragma GCC unroll 4
    for (int m = 0; m < (kM ? kM : s.models); ++m) {
      const int64_t at = m * s.mask.stride + s.place + i;
      const V<A> d = load_delta<A, kBf16>(s.in, m, i, base);
      bad = d == d ? bad : d;
      kept[m] = load_mask<A>(s.mask.kept + at);
      const auto term_of = [&](A coefficient) {
        const V<A> y = term(kept[m], V<A>{} + coefficient, d);
        if (kRule != kAnyRule || !s.mask.divide) return y;
        return kept[m] ? y / Lane<A>::from(load_floats(s.mask.divide + at)) : y;
      };
      x[m] = term_of(s.numbers.weighted[m]);
      if (!elects) continue;
      votes[m] = rule.weighted ? x[m] : term_of(s.numbers.plain[m]);
      sorted[m] = votes[m];
      total = total + elected_sign(votes[m], 0);
    }
    if (rule.election == Election::kSum) total = sum_terms<kM>(sorted, s.models);
    sign = elected_sign(total, s.rule.zero);
  }

  // Of the terms that agree.
  GEMMA_EXT_INLINE V<A> value(const Rule& rule, int models, const K<A>* agree) const {
    const int count = kM ? kM : models;
    V<A> y[kRoom];
    if (rule.election == Election::kSum && rule.weighted) {
#pragma GCC unroll 4
      for (int m = 0; m < count; ++m) y[m] = agrees(sorted[m], sign) ? sorted[m] : nothing<V<A>>();
      return sum_sorted<kM>(y, models);
    }
#pragma GCC unroll 4
    for (int m = 0; m < count; ++m) y[m] = agree[m] ? x[m] : nothing<V<A>>();
    return sum_terms<kM>(y, models);
  }
};

// Weights of who agrees.
template <class A, int kM>
GEMMA_EXT_INLINE V<A> weight_of(const Step<A>& s, const K<A>* agree) {
  V<A> w[kM ? kM : kMaxModels], sum = V<A>{};
#pragma GCC unroll 4
  for (int m = 0; m < (kM ? kM : s.models); ++m) {
    w[m] = agree[m] ? V<A>{} + s.numbers.weight[m] : V<A>{};
    sum = sum + w[m];
  }
  return s.numbers.equal ? sum : sum_terms<kM>(w, s.models);
}

// Not inlined: in one function with its siblings the registers do not suffice.
template <class A, bool kBf16, int kM, int kRule, class Out>
__attribute__((noinline)) void merge_step(const Step<A>& s, Out* out) {
  const Rule rule = kRule == kAnyRule ? s.rule : kRules[kRule % kAnyRule];
  const bool elects = rule.election != Election::kNone;
  for (int i = 0; i < s.n; i += kLanes) {
    const Ballot<A, kBf16, kM, kRule> b(s, rule, i);
    Combined<V<A>> c{};
    K<A> agree[kM ? kM : kMaxModels];
#pragma GCC unroll 4
    for (int m = 0; m < (kM ? kM : s.models); ++m) {
      agree[m] = elects ? agrees(b.votes[m], b.sign) : b.kept[m];
      combine(rule.combine, agree[m], b.x[m], V<A>{} + s.numbers.alone[m], &c);
    }
    if (rule.combine != Combine::kMax) c.value = b.value(rule, s.models, agree);
    if (rule.combine == Combine::kWeightedMean) c.weight = weight_of<A, kM>(s, agree);
    const V<A> result = combined(rule.combine, kRule == kAnyRule && s.has_alone, c);
    const V<A> y = moved(s.in.base != nullptr, b.base, s.scale, result);
    put_lanes(out, i, b.bad == b.bad ? y : b.bad);
  }
}

inline int rule_of(const Step<float>& s) {
  if (s.mask.divide || s.has_alone) return kAnyRule;
  for (int r = 0; r < kAnyRule; ++r) {
    const Rule& rule = kRules[r];
    const bool voted = rule.election == Election::kNone || s.rule.weighted;
    if (rule.election == s.rule.election && rule.combine == s.rule.combine && voted) return r;
  }
  return kAnyRule;
}

// bfloat16 all over, the usual case: models and rule are known when this is compiled.
template <int kM>
void merge_bf16(const Step<float>& s, uint16_t* out) {
  switch (rule_of(s)) {
    case 0: return merge_step<float, true, kM, 0>(s, out);
    case 1: return merge_step<float, true, kM, 1>(s, out);
    case 2: return merge_step<float, true, kM, 2>(s, out);
    case 3: return merge_step<float, true, kM, 3>(s, out);
    default: return merge_step<float, true, 0, kAnyRule>(s, out);
  }
}

// A vector of ones made in a register would wait for the one of the elements before.
inline Kept or_ones(const Kept& mask, Scratch& s) {
  if (mask.kept) return mask;
  uint8_t* ones = scratch<uint8_t>(s, kMasks, kStep);
  memset(ones, 1, kStep);
  return {ones, nullptr, 0, 0};
}

template <class A>
void merge_run(const Merge& call, const Run& run, const Kept& given, bool stream, Scratch& s) {
  const Table& t = call.table;
  const Numbers<A> numbers(call.weights, call.divide, call.alone, t.models, run.part);
  const Array& out = t.out[run.part];
  A* result = scratch<A>(s, kValues, kStep);
  const Kept mask = or_ones(given, s);
  in_steps(run, [&](int64_t at, int n) {
    const Inputs in(t, run.part, at, n, true, s);
    const Step<A> step{in,
                       numbers,
                       call.rule,
                       mask,
                       given.kept ? at - mask.begin : 0,
                       A(call.scale[run.part]),
                       call.alone != nullptr,
                       t.models,
                       n};
    if constexpr (sizeof(A) == sizeof(float))
      if (in.bf16 && out.type == DType::kBFloat16 && call.rounding == Rounding::kNearest) {
        alignas(64) uint16_t narrow[kStep];
        switch (t.models) {
          case 2: merge_bf16<2>(step, narrow); break;
          case 3: merge_bf16<3>(step, narrow); break;
          case 4: merge_bf16<4>(step, narrow); break;
          default: merge_bf16<0>(step, narrow); break;
        }
        return put(out, at, n, narrow, stream);
      }
    in.bf16 ? merge_step<A, true, 0, kAnyRule>(step, result)
            : merge_step<A, false, 0, kAnyRule>(step, result);
    store(out, at, n, result, rounding_words(call.rounding, out, t.part[run.part], at, n, s),
          stream);
  });
  end_stream(stream);
}

void merge(const Merge& call, const Run& run, const Kept& mask, bool stream, Scratch& s) {
  is_wide(call.wide, call.table.out[run.part]) ? merge_run<double>(call, run, mask, stream, s)
                                               : merge_run<float>(call, run, mask, stream, s);
}

template <bool kBf16>
int64_t sign_balance(const Step<float>& s) {
  int64_t sum = 0;
  for (int i = 0; i < s.n; i += kLanes) {
    const Ballot<float, kBf16, 0, kAnyRule> b(s, s.rule, i);
    for (int k = 0; k < kLanes && i + k < s.n; ++k) sum += int64_t(b.sign[k]);
  }
  return sum;
}

// In a call of kOverlaps out is [M, 2], of kBalance [1].
void count(const Counts& call, const Run& run, const Kept& mask, int64_t* out, Scratch& s) {
  const Table& t = call.table;
  const int models = t.models;
  if (call.count == Count::kOverlaps) {
    for (int64_t at = run.begin - mask.begin, i = 0; i < run.count; ++i) {
      int standing = 0;
      const auto kept = [&](int m) {
        return mask.kept ? mask.kept[m * mask.stride + at + i] : uint8_t{1};
      };
      for (int m = 0; m < models; ++m) standing += kept(m);
      for (int m = 0; m < models; ++m)
        if (kept(m)) ++out[2 * m + (standing > 1)];
    }
    return;
  }
  const Numbers<float> numbers(call.weights, call.divide, nullptr, models, run.part);
  Rule rule = call.rule;
  rule.zero = 0;
  const Kept all = or_ones(mask, s);
  in_steps(run, [&](int64_t at, int n) {
    const Inputs in(t, run.part, at, n, true, s);
    const int64_t place = mask.kept ? at - mask.begin : 0;
    const Step<float> step{in, numbers, rule, all, place, 1.0f, false, models, n};
    out[0] += in.bf16 ? sign_balance<true>(step) : sign_balance<false>(step);
  });
}

}  // namespace
}  // namespace gemma_ext::souping::GEMMA_EXT_ISA
