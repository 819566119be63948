// SPDX-License-Identifier: Apache-2.0
// Element rules with numbers of their own, of an octet.
#pragma once

#include "chunk.cuh"

namespace gemma_ext::souping::cuda {

struct ApplyParams {
  Plan plan;
  Range chunks;
  const double* numbers;  // [T, columns]
  int columns, votes, task;
  Rounding rounding;
};

template <class A>
using Values = A[kLanes];

// What a rule sees.
template <class A, int kM>
struct Seen {
  const ApplyParams& p;
  const Chunk& k;
  const Octet& o;
  const double* numbers;
  Deltas<A, kM> deltas;

  DEVICE Seen(const ApplyParams& p, const Chunk& k, const Octet& o)
      : p(p), k(k), o(o), numbers(p.numbers + k.number * p.columns), deltas(k, o) {}

  DEVICE A number(int i) const { return static_cast<A>(numbers[i]); }
  template <class F>
  DEVICE void each(F f) {
    each_model<kM>(k.models, [&](int m) { f(m, deltas.of(m)); });
  }
};

template <class A, int kM>
DEVICE void consensus(Seen<A, kM>& s, Values<A>& y) {
  Values<A> total;
  int votes[kLanes] = {};
  bool chosen[kLanes] = {};
  each_position<kM>([&](int j) {
    total[j] = sum_models<kM, A>(s.k.models, [&](int m) { return s.deltas.at(m, j); });
  });
  s.each([&](int m, const Values<A>& d) {
    const A lambda = s.number(m);
    UNROLL
    for (int j = 0; j < kLanes; ++j) {
      const bool uses = fabs(d[j]) > lambda * fabs(total[j] - d[j]);
      votes[j] += uses;
      chosen[j] = m == s.p.task ? uses : chosen[j];
    }
  });
  const A scale = s.number(s.k.models);
  UNROLL
  for (int j = 0; j < kLanes; ++j) {
    const bool use = s.p.task < 0 ? votes[j] >= s.p.votes : chosen[j];
    const A moved = s.deltas.base[j] + scale * (use ? total[j] : A{0});
    y[j] = total[j] == total[j] ? moved : static_cast<A>(from_bits(kNan));
  }
}

template <class A, int kM>
DEVICE void fisher(Seen<A, kM>& s, Values<A>& y) {
  const int models = s.k.models;
  const A add = s.number(2 * models);
  const A coefficients = sum_models<kM, A>(models, [&](int m) { return s.number(m); });
  each_position<kM>([&](int j) {
    const auto weight = [&](int m) {
      // one by one, from L1: of all models at once the registers do not suffice
      const float mine = s.o.has(j) ? element(s.k.extra(m), s.o.first + j) : 0.0f;
      return fisher_weight(s.number(m), static_cast<A>(mine), s.number(models + m), add);
    };
    const A below = sum_models<kM, A>(models, weight);
    const A above = sum_models<kM, A>(models, [&](int m) { return weight(m) * s.deltas.at(m, j); });
    const A mean = above / below;
    if (s.k.based) {
      y[j] = s.deltas.base[j] + (below == 0 ? A{0} : mean);
    } else {
      const A plain =
          sum_models<kM, A>(models, [&](int m) { return s.number(m) * s.deltas.at(m, j); });
      y[j] = below == 0 ? plain / coefficients : mean;
    }
  });
}

template <class A, int kM>
DEVICE void nearswap_rule(Seen<A, kM>& s, Values<A>& y) {
  const A t = s.number(0);
  const Values<A>& d = s.deltas.of(0);
  UNROLL
  for (int j = 0; j < kLanes; ++j) y[j] = nearswap(s.deltas.base[j], d[j], t);
}

template <class A, int kM>
DEVICE void mutate(Seen<A, kM>& s, Values<A>& y) {
  const uint32_t bound = reach(s.numbers[0]);
  const A sigma = s.number(1);
  const uint32_t model = s.p.plan.table.model[s.k.part * s.k.models];
  const Bits hit = random_words(s.k.key, s.o.first, model, kGene);
  const Bits noise = random_words(s.k.key, s.o.first, model, kNoise);
  const Values<A>& x = s.deltas.of(0);
  UNROLL
  for (int j = 0; j < kLanes; j += 2) {
    float normal[2];
    normal_pair(noise.word[j], noise.word[j + 1], &normal[0], &normal[1]);
    UNROLL
    for (int i = 0; i < 2; ++i) {
      const A moved = x[j + i] + sigma * static_cast<A>(normal[i]);
      y[j + i] = draw(hit.word[j + i]) < bound ? moved : x[j + i];
    }
  }
}

// Chances are float32 in both cases, so that the same parent is picked.
template <class A, int kM>
DEVICE void pick(Seen<A, kM>& s, bool by_magnitude, Values<A>& y) {
  const Bits chance = random_words(s.k.key, s.o.first, 0, kChoice);
  Values<float> top = {}, total = {}, at, bound = {};
  const auto size = [](A x) { return fabsf(static_cast<float>(x)); };
  if (by_magnitude) {
    s.each([&](int, const Values<A>& x) {
      UNROLL
      for (int j = 0; j < kLanes; ++j) top[j] = size(x[j]) > top[j] ? size(x[j]) : top[j];
    });
  }
  const auto share = [&](int m, A x, float most) {
    const float part = by_magnitude ? exp_of(size(x) - most) : 1.0f;
    return static_cast<float>(s.numbers[m]) * part;
  };
  s.each([&](int m, const Values<A>& x) {
    UNROLL
    for (int j = 0; j < kLanes; ++j) total[j] = total[j] + share(m, x[j], top[j]);
  });
  UNROLL
  for (int j = 0; j < kLanes; ++j) at[j] = uniform(chance.word[j]) * total[j];
  // the same sums once more: where each model's share begins
  s.each([&](int m, const Values<A>& x) {
    UNROLL
    for (int j = 0; j < kLanes; ++j) {
      y[j] = m == 0 || at[j] >= bound[j] ? x[j] : y[j];
      bound[j] = bound[j] + share(m, x[j], top[j]);
    }
  });
}

template <class A, int kM>
DEVICE void blend(Seen<A, kM>& s, Values<A>& y) {
  const A alpha = s.number(s.k.models);
  NO_UNROLL
  for (int j = 0; j < kLanes; ++j) {
    A x[kMaxModels] = {}, terms[kMaxModels] = {};
    for (int m = 0; m < s.k.models; ++m) {
      x[m] = s.deltas.at(m, j);
      terms[m] = weighted(s.number(m), x[m]);
    }
    y[j] = blended<0>(x, terms, s.k.models, alpha);
  }
}

}  // namespace gemma_ext::souping::cuda
