// SPDX-License-Identifier: Apache-2.0
// Trim, elect, combine: out = base + scale result.
#pragma once

#include "stages.h"

namespace gemma_ext::souping::GEMMA_EXT_ISA {
namespace {

// coefficient delta [/ divide], 0 where not kept.
template <class A>
void terms(const A* __restrict delta, const uint8_t* __restrict kept,
           const float* __restrict divide, A coefficient, int n, A* __restrict x) {
  if (!kept)
    for (int i = 0; i < n; ++i) x[i] = coefficient * delta[i];
  else
    for (int i = 0; i < n; ++i) x[i] = term<A>(kept[i] != 0, coefficient, delta[i]);
  if (divide)
    for (int i = 0; i < n; ++i) x[i] = kept[i] ? x[i] / A(divide[i]) : A(0);
}

template <class A>
struct Numbers {
  A weight[kMaxModels], alone[kMaxModels];
  A weighted[kMaxModels], plain[kMaxModels];  // coefficients of a term, of a vote without weights

  Numbers(const double* weights, const double* divide, const double* alones, int models,
          int64_t part) {
    for (int m = 0; m < models; ++m) {
      const int64_t at = part * models + m;
      weight[m] = A(weights[at]);
      weighted[m] = A(weights[at] / divide[at]);
      plain[m] = A(1 / divide[at]);
      alone[m] = alones ? A(alones[at]) : A(1);
    }
  }
};

// Terms and votes of a step, and what is kept: all ones where no mask says.
template <class A>
struct Ballot {
  const A *x[kMaxModels], *votes[kMaxModels];
  const uint8_t* kept[kMaxModels];
  const A* sign;  // elected, where there is an election
  int models, n;

  static int64_t values(int models) { return int64_t(2 * models + 1) * kStep; }

  Ballot(const Rule& rule, const Numbers<A>& numbers, const A* const* delta, int64_t at,
         const Kept& mask, const uint8_t* ones, int models, int n, A* buffer)
      : models(models), n(n) {
    const bool elects = rule.election != Election::kNone;
    for (int m = 0; m < models; ++m) {
      const int64_t place = m * mask.stride + (at - mask.begin);
      const uint8_t* mine = mask.kept ? mask.kept + place : nullptr;
      const float* divide = mask.divide ? mask.divide + place : nullptr;
      A *to = buffer + 2 * m * kStep, *other = to + kStep;
      terms(delta[m], mine, divide, numbers.weighted[m], n, to);
      x[m] = votes[m] = to;
      kept[m] = mine ? mine : ones;
      if (!elects || rule.weighted) continue;
      terms(delta[m], mine, divide, numbers.plain[m], n, other);
      votes[m] = other;
    }
    A* elected = buffer + 2 * models * kStep;
    sign = elected;
    if (elects) elect(rule, elected);
  }

 private:
  void elect(const Rule& rule, A* __restrict total) const {
    for (int i = 0; i < n; ++i) total[i] = 0;
    for (int m = 0; m < models; ++m) {
      const A* __restrict v = votes[m];
      if (rule.election == Election::kCount)
        for (int i = 0; i < n; ++i) total[i] = total[i] + vote(Election::kCount, v[i]);
      else
        for (int i = 0; i < n; ++i) total[i] = total[i] + v[i];
    }
    for (int i = 0; i < n; ++i) total[i] = elected_sign(total[i], rule.zero);
  }
};

// Sums over A of a step, kStep each.
template <class A>
struct Held {
  A *value, *count, *weight, *alone;
};

template <class A>
using CombineStep = void (*)(const Ballot<A>&, const Numbers<A>&, const Held<A>&);

template <class A, Combine kHow, bool kElected, bool kAlone>
void combine_step(const Ballot<A>& b, const Numbers<A>& numbers, const Held<A>& held) {
  constexpr bool kCounts = kHow == Combine::kMean || kAlone;
  constexpr bool kWeighs = kHow == Combine::kWeightedMean;
  A* __restrict value = held.value, * __restrict count = held.count;
  A* __restrict weight = held.weight, * __restrict alone = held.alone;
  const int n = b.n;
  for (int i = 0; i < n; ++i) {
    value[i] = 0;
    if (kCounts) count[i] = 0;
    if (kWeighs) weight[i] = 0;
    if (kAlone) alone[i] = 0;
  }
  for (int m = 0; m < b.models; ++m) {
    const A* __restrict x = b.x[m], * __restrict votes = b.votes[m], * __restrict sign = b.sign;
    const uint8_t* __restrict kept = b.kept[m];
    const A mine = numbers.weight[m], factor = numbers.alone[m];
    for (int i = 0; i < n; ++i) {
      const bool agree = kElected ? agrees(true, votes[i], sign[i]) : kept[i] != 0;
      Combined<A> c{value[i], kCounts ? count[i] : 0, kWeighs ? weight[i] : 0,
                    kAlone ? alone[i] : 0};
      combine(kHow, agree, x[i], mine, factor, &c);
      value[i] = c.value;
      if (kCounts) count[i] = c.count;
      if (kWeighs) weight[i] = c.weight;
      if (kAlone) alone[i] = c.alone;
    }
  }
  for (int i = 0; i < n; ++i)
    value[i] = combined(kHow, kAlone,
                        Combined<A>{value[i], kCounts ? count[i] : 0, kWeighs ? weight[i] : 0,
                                    kAlone ? alone[i] : 0});
}

template <class A, Combine kHow>
CombineStep<A> combiner_of(bool elected, bool alone) {
  if (elected)
    return alone ? combine_step<A, kHow, true, true> : combine_step<A, kHow, true, false>;
  return alone ? combine_step<A, kHow, false, true> : combine_step<A, kHow, false, false>;
}

template <class A>
CombineStep<A> combiner(Combine how, bool elected, bool alone) {
  switch (how) {
    case Combine::kSum: return combiner_of<A, Combine::kSum>(elected, alone);
    case Combine::kMean: return combiner_of<A, Combine::kMean>(elected, alone);
    case Combine::kWeightedMean: return combiner_of<A, Combine::kWeightedMean>(elected, alone);
    case Combine::kMax: break;
  }
  return combiner_of<A, Combine::kMax>(elected, alone);
}

template <class A>
void merge_run(const Merge& call, const Run& run, const Kept& mask, bool stream, Scratch& s) {
  const Table& t = call.table;
  const int models = t.models;
  const Numbers<A> numbers(call.weights, call.divide, call.alone, models, run.part);
  const A scale = A(call.scale[run.part]);
  const Array& out = t.out[run.part];
  const CombineStep<A> combine =
      combiner<A>(call.rule.combine, call.rule.election != Election::kNone, call.alone);
  A* buffer = scratch<A>(s, kValues, Ballot<A>::values(models) + 4 * kStep);
  A* __restrict result = buffer + Ballot<A>::values(models);
  const Held<A> held{result, result + kStep, result + 2 * kStep, result + 3 * kStep};
  uint8_t* ones = scratch<uint8_t>(s, kMasks, kStep);
  memset(ones, 1, kStep);
  in_steps(run, [&](int64_t at, int n) {
    const Deltas<A> d(t, run.part, at, n, s);
    const Ballot<A> ballot(call.rule, numbers, d.at, at, mask, ones, models, n, buffer);
    combine(ballot, numbers, held);
    const float* __restrict base = d.base;
    if (base)
      for (int i = 0; i < n; ++i) result[i] = A(base[i]) + scale * result[i];
    else
      for (int i = 0; i < n; ++i) result[i] = scale * result[i];
    for (int m = 0; m < models; ++m) {
      const A* __restrict delta = d.at[m];
      for (int i = 0; i < n; ++i) result[i] = delta[i] == delta[i] ? result[i] : A(NAN);
    }
    store(out, at, n, result, rounding_words(call.rounding, out, t.part[run.part], at, n, s),
          stream);
  });
  end_stream(stream);
}

void merge(const Merge& call, const Run& run, const Kept& mask, bool stream, Scratch& s) {
  is_wide(call.wide, call.table.out[run.part]) ? merge_run<double>(call, run, mask, stream, s)
                                               : merge_run<float>(call, run, mask, stream, s);
}

// In a call of kOverlaps out is [M, 2], of kBalance [1].
void count(const Counts& call, const Run& run, const Kept& mask, int64_t* out, Scratch& s) {
  const Table& t = call.table;
  const int models = t.models;
  uint8_t* ones = scratch<uint8_t>(s, kMasks, kStep);
  memset(ones, 1, kStep);
  if (call.count == Count::kOverlaps) {
    in_steps(run, [&](int64_t at, int n) {
      for (int i = 0; i < n; ++i) {
        int standing = 0;
        const auto kept = [&](int m) {
          return mask.kept ? mask.kept[m * mask.stride + (at - mask.begin) + i] : uint8_t{1};
        };
        for (int m = 0; m < models; ++m) standing += kept(m);
        for (int m = 0; m < models; ++m)
          if (kept(m)) ++out[2 * m + (standing > 1)];
      }
    });
    return;
  }
  const Numbers<float> numbers(call.weights, call.divide, nullptr, models, run.part);
  float* buffer = scratch<float>(s, kValues, Ballot<float>::values(models));
  Rule rule = call.rule;
  rule.zero = 0;
  in_steps(run, [&](int64_t at, int n) {
    const Deltas<float> d(t, run.part, at, n, s);
    const Ballot<float> ballot(rule, numbers, d.at, at, mask, ones, models, n, buffer);
    for (int i = 0; i < n; ++i) out[0] += int64_t(ballot.sign[i]);
  });
}

}  // namespace
}  // namespace gemma_ext::souping::GEMMA_EXT_ISA
