// SPDX-License-Identifier: Apache-2.0
// Element rules with numbers of their own, swarm steps, rows from elsewhere.
#pragma once

#include "lanes.h"

namespace gemma_ext::souping::GEMMA_EXT_ISA {
namespace {

// What a rule sees of a step.
template <class A>
struct Seen {
  const Apply& call;
  const Part& part;
  const A* const* delta;      // [M], or the sources where there is no base
  const float* const* extra;  // [X]
  const float* base;
  const double* numbers;
  int64_t position;
  int models, n;
  uint32_t model;   // of the first source, in random numbers
  uint32_t* words;  // [2, kWordRoom]
};

template <class A>
void consensus(const Seen<A>& s, A* __restrict out) {
  const A scale = A(s.numbers[s.models]);
  for (int i = 0; i < s.n; ++i) {
    A terms[kMaxModels];
    for (int m = 0; m < s.models; ++m) terms[m] = s.delta[m][i];
    const A total = sum_terms<0>(terms, s.models);
    int votes = 0;
    bool chosen = false;
    for (int m = 0; m < s.models; ++m) {
      const A d = s.delta[m][i];
      const bool uses = fabs(d) > A(s.numbers[m]) * fabs(total - d);
      votes += uses;
      chosen = m == s.call.task ? uses : chosen;
    }
    const bool use = s.call.task < 0 ? votes >= s.call.votes : chosen;
    out[i] = total == total ? A(s.base[i]) + scale * (use ? total : A(0)) : A(NAN);
  }
}

template <class A>
void fisher(const Seen<A>& s, A* __restrict out) {
  const A add = A(s.numbers[2 * s.models]);
  A above[kMaxModels], below[kMaxModels], plain[kMaxModels];
  for (int m = 0; m < s.models; ++m) plain[m] = A(s.numbers[m]);
  const A coefficients = sum_terms<0>(plain, s.models);
  for (int i = 0; i < s.n; ++i) {
    for (int m = 0; m < s.models; ++m) {
      const A c = A(s.numbers[m]), d = s.delta[m][i];
      below[m] = fisher_weight(c, A(s.extra[m][i]), A(s.numbers[s.models + m]), add);
      above[m] = below[m] * d;
      plain[m] = c * d;
    }
    const A divisor = sum_terms<0>(below, s.models);
    const A mean = sum_terms<0>(above, s.models) / divisor;
    if (s.base)
      out[i] = A(s.base[i]) + (divisor == 0 ? A(0) : mean);
    else
      out[i] = divisor == 0 ? sum_terms<0>(plain, s.models) / coefficients : mean;
  }
}

template <class A>
void nearswap_rule(const Seen<A>& s, A* __restrict out) {
  const A t = A(s.numbers[0]);
  for (int i = 0; i < s.n; ++i) out[i] = nearswap(A(s.base[i]), s.delta[0][i], t);
}

template <class A>
void mutate(const Seen<A>& s, A* __restrict out) {
  const uint32_t bound = reach(s.numbers[0]);
  const A sigma = A(s.numbers[1]);
  const uint32_t* hit = random_words(s.part.key, s.model, kGene, s.position, s.n, s.words);
  const int skip = int(s.position % 2);
  const uint32_t* noise = random_words(s.part.key, s.model, kNoise, s.position - skip,
                                       (s.n + skip + 1) / 2 * 2, s.words + kWordRoom);
  float normal[kStep + 2];
  for (int i = 0; i < s.n + skip; i += 2)
    normal_pair(noise[i], noise[i + 1], normal + i, normal + i + 1);
  const A* __restrict x = s.delta[0];
  for (int i = 0; i < s.n; ++i) {
    const A moved = x[i] + sigma * A(normal[i + skip]);
    out[i] = draw(hit[i]) < bound ? moved : x[i];
  }
}

// Chances are float32 in both cases, so that the same parent is picked.
template <class A>
void pick(const Seen<A>& s, A* __restrict out) {
  const bool by_magnitude = s.call.element == Element::kPickMagnitude;
  const uint32_t* chance = random_words(s.part.key, 0, kChoice, s.position, s.n, s.words);
  for (int i = 0; i < s.n; ++i) {
    float top = 0, bound[kMaxModels], total = 0;
    for (int m = 0; by_magnitude && m < s.models; ++m) {
      const float size = fabsf(float(s.delta[m][i]));
      top = size > top ? size : top;
    }
    for (int m = 0; m < s.models; ++m) {
      const float share = by_magnitude ? exp_of(fabsf(float(s.delta[m][i])) - top) : 1.0f;
      total = total + float(s.numbers[m]) * share;
      bound[m] = total;
    }
    const float at = uniform(chance[i]) * total;
    A found = s.delta[0][i];
    for (int m = 1; m < s.models; ++m) found = at >= bound[m - 1] ? s.delta[m][i] : found;
    out[i] = found;
  }
}

template <class A>
void blend(const Seen<A>& s, A* __restrict out) {
  const A alpha = A(s.numbers[s.models]);
  A x[kMaxModels] = {}, terms[kMaxModels] = {};
  for (int i = 0; i < s.n; ++i) {
    for (int m = 0; m < s.models; ++m) {
      x[m] = s.delta[m][i];
      terms[m] = weighted(A(s.numbers[m]), x[m]);
    }
    out[i] = blended<0>(x, terms, s.models, alpha);
  }
}

template <class A>
void apply_run(const Apply& call, const Run& run, Scratch& s) {
  const Table& t = call.table;
  const Part& part = t.part[run.part];
  const Array& out = t.out[run.part];
  float* extra = scratch<float>(s, kValues, t.extras * kStep);
  A* result = scratch<A>(s, kResult, kStep);
  uint32_t* words = scratch<uint32_t>(s, kMasks, 2 * kWordRoom);
  const float* extras[kMaxModels];
  using Function = void (*)(const Seen<A>&, A*);
  constexpr Function kRules[] = {consensus<A>, fisher<A>, nearswap_rule<A>, mutate<A>,
                                 pick<A>,      pick<A>,   blend<A>};
  const Function rule = kRules[int(call.element)];
  in_steps(run, [&](int64_t at, int n) {
    const Deltas<A> d(t, run.part, at, n, s);
    for (int x = 0; x < t.extras; ++x)
      extras[x] = widen(t.extra[run.part * t.extras + x], at, n, extra + x * kStep);
    rule({call, part, d.at, extras, d.base, call.numbers + run.part * call.columns,
          part.offset + at, t.models, n, t.model[run.part * t.models], words},
         result);
    store(out, at, n, result, rounding_words(call.rounding, out, part, at, n, s), false);
  });
}

void apply(const Apply& call, const Run& run, Scratch& s) {
  is_wide(false, call.table.out[run.part]) ? apply_run<double>(call, run, s)
                                           : apply_run<float>(call, run, s);
}

template <class A>
void swarm_run(const Swarm& call, const Run& run, Scratch& s) {
  const Table& t = call.table;
  const Array &out = t.out[run.part], &velocity = call.velocity[run.part];
  const double* numbers = call.numbers + run.part * 5;
  const A c[4] = {A(numbers[0]), A(numbers[1]), A(numbers[2]), A(numbers[3])};
  const A step = A(numbers[4]);
  float* inputs = scratch<float>(s, kInputs, 5 * kStep);
  A* __restrict moved = scratch<A>(s, kResult, 2 * kStep), * __restrict speed = moved + kStep;
  in_steps(run, [&](int64_t at, int n) {
    const float* p[4];
    for (int k = 0; k < 4; ++k) p[k] = widen(t.source[run.part * 4 + k], at, n, inputs + k * kStep);
    const float* v = widen(velocity, at, n, inputs + 4 * kStep);
    for (int i = 0; i < n; ++i) {
      speed[i] = swarm_velocity(c, A(p[0][i]), A(v[i]), A(p[1][i]), A(p[2][i]), A(p[3][i]));
      moved[i] = A(p[0][i]) + step * speed[i];
    }
    store<A>(velocity, at, n, speed, nullptr, false);
    store(out, at, n, moved, rounding_words(call.rounding, out, t.part[run.part], at, n, s), false);
  });
}

void swarm(const Swarm& call, const Run& run, Scratch& s) {
  is_wide(false, call.table.out[run.part]) ? swarm_run<double>(call, run, s)
                                           : swarm_run<float>(call, run, s);
}

void gather_rows(const GatherRows& call, int64_t first, int64_t last, Scratch& s) {
  const int64_t width = call.width, size = size_of(call.out.type);
  char* out = static_cast<char*>(const_cast<void*>(call.out.data));
  float* sum = scratch<float>(s, kResult, kStep);
  float* buffer = scratch<float>(s, kInputs, (call.models + 1) * kStep);
  for (int64_t v = first; v < last; ++v) {
    const int64_t* rows = call.rows + v * call.models;
    int owners = 0, owner = 0;
    for (int m = 0; m < call.models; ++m)
      if (rows[m] >= 0) {
        ++owners;
        owner = m;
      }
    const Array& only = call.source[owner];
    if (owners == 1 && only.type == call.out.type) {
      memcpy(out + v * width * size,
             static_cast<const char*>(only.data) + rows[owner] * width * size, width * size);
      continue;
    }
    in_steps({0, 0, width}, [&](int64_t at, int n) {
      float* to = buffer;
      for (int m = 0; m < call.models; ++m) {
        if (rows[m] < 0) continue;
        const float* x = widen(call.source[m], rows[m] * width + at, n, to);
        if (x != to) memcpy(to, x, n * sizeof(float));
        to += kStep;
      }
      for (int i = 0; i < n; i += kLanes) {
        Vf x[kMaxModels];
        for (int m = 0; m < owners; ++m) x[m] = load_floats(buffer + m * kStep + i);
        const Vf total = sum_terms<0>(x, owners);
        put_lanes(sum, i, owners ? total / float(owners) : Vf{});
      }
      store<float>(call.out, v * width + at, n, sum, nullptr, false);
    });
  }
}

}  // namespace
}  // namespace gemma_ext::souping::GEMMA_EXT_ISA
