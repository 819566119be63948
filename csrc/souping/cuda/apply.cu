// SPDX-License-Identifier: Apache-2.0
// Element rules with numbers of their own, and swarm steps.
#include "chunk.cuh"

namespace gemma_ext::souping::cuda {
namespace {

struct ApplyParams {
  Plan plan;
  Range chunks;
  const double* numbers;  // [T, columns]
  int columns, votes, task;
  Rounding rounding;
};

// What a rule sees of an octet.
template <int kM>
struct Seen {
  const ApplyParams& p;
  const Chunk& k;
  const Octet& o;
  const double* numbers;
  Deltas<float, kM> deltas;

  DEVICE Seen(const ApplyParams& p, const Chunk& k, const Octet& o)
      : p(p), k(k), o(o), numbers(p.numbers + k.number * p.columns), deltas(k, o) {}

  DEVICE float number(int i) const { return static_cast<float>(numbers[i]); }
  template <class F>
  DEVICE void each(F f) {
    each_model<kM>(k.models, [&](int m) { f(m, deltas.of(m)); });
  }
};

using Values = float[kLanes];

template <int kM>
DEVICE void consensus(Seen<kM>& s, Values& y) {
  float total[kLanes] = {};
  int votes[kLanes] = {};
  bool chosen[kLanes] = {};
  s.each([&](int, const Values& d) {
    UNROLL
    for (int j = 0; j < kLanes; ++j) total[j] = total[j] + d[j];
  });
  s.each([&](int m, const Values& d) {
    const float lambda = s.number(m);
    UNROLL
    for (int j = 0; j < kLanes; ++j) {
      const bool uses = fabsf(d[j]) > lambda * fabsf(total[j] - d[j]);
      votes[j] += uses;
      chosen[j] = m == s.p.task ? uses : chosen[j];
    }
  });
  const float scale = s.number(s.k.models);
  UNROLL
  for (int j = 0; j < kLanes; ++j) {
    const bool use = s.p.task < 0 ? votes[j] >= s.p.votes : chosen[j];
    const float moved = s.deltas.base[j] + scale * (use ? total[j] : 0.0f);
    y[j] = total[j] == total[j] ? moved : from_bits(kNan);
  }
}

template <int kM>
DEVICE void fisher(Seen<kM>& s, Values& y) {
  const int models = s.k.models;
  const float add = s.number(2 * models);
  float above[kLanes] = {}, below[kLanes] = {}, plain[kLanes] = {}, coefficients = 0;
  s.each([&](int m, const Values& d) {
    const float c = s.number(m), floor = s.number(models + m);
    Values f;
    load(s.k.extra(m), s.o, f);
    coefficients = coefficients + c;
    UNROLL
    for (int j = 0; j < kLanes; ++j) {
      const float weight = fisher_weight(c, f[j], floor, add);
      above[j] = above[j] + weight * d[j];
      below[j] = below[j] + weight;
      plain[j] = plain[j] + c * d[j];
    }
  });
  UNROLL
  for (int j = 0; j < kLanes; ++j) {
    const float mean = above[j] / below[j];
    if (s.k.based) {
      y[j] = s.deltas.base[j] + (below[j] == 0 ? 0.0f : mean);
    } else {
      y[j] = below[j] == 0 ? plain[j] / coefficients : mean;
    }
  }
}

template <int kM>
DEVICE void nearswap_rule(Seen<kM>& s, Values& y) {
  const float t = s.number(0);
  const Values& d = s.deltas.of(0);
  UNROLL
  for (int j = 0; j < kLanes; ++j) y[j] = nearswap(s.deltas.base[j], d[j], t);
}

template <int kM>
DEVICE void mutate(Seen<kM>& s, Values& y) {
  const uint32_t bound = reach(s.numbers[0]);
  const float sigma = s.number(1);
  const uint32_t model = s.p.plan.table.model[s.k.part * s.k.models];
  uint32_t hit[kLanes], noise[kLanes];
  random_words(s.k.key, s.o, model, kGene, hit);
  random_words(s.k.key, s.o, model, kNoise, noise);
  const Values& x = s.deltas.of(0);
  UNROLL
  for (int j = 0; j < kLanes; j += 2) {
    float normal[2];
    normal_pair(noise[j], noise[j + 1], &normal[0], &normal[1]);
    UNROLL
    for (int i = 0; i < 2; ++i) {
      const float moved = x[j + i] + sigma * normal[i];
      y[j + i] = draw(hit[j + i]) < bound ? moved : x[j + i];
    }
  }
}

template <int kM>
DEVICE void pick(Seen<kM>& s, bool by_magnitude, Values& y) {
  uint32_t chance[kLanes];
  random_words(s.k.key, s.o, 0, kChoice, chance);
  float top[kLanes] = {}, total[kLanes] = {}, at[kLanes], bound[kLanes] = {};
  if (by_magnitude) {
    s.each([&](int, const Values& x) {
      UNROLL
      for (int j = 0; j < kLanes; ++j) top[j] = fabsf(x[j]) > top[j] ? fabsf(x[j]) : top[j];
    });
  }
  const auto share = [&](int m, float x, float most) {
    return s.number(m) * (by_magnitude ? exp_of(fabsf(x) - most) : 1.0f);
  };
  s.each([&](int m, const Values& x) {
    UNROLL
    for (int j = 0; j < kLanes; ++j) total[j] = total[j] + share(m, x[j], top[j]);
  });
  UNROLL
  for (int j = 0; j < kLanes; ++j) at[j] = uniform(chance[j]) * total[j];
  // the same sums once more: where each model's share begins
  s.each([&](int m, const Values& x) {
    UNROLL
    for (int j = 0; j < kLanes; ++j) {
      y[j] = m == 0 || at[j] >= bound[j] ? x[j] : y[j];
      bound[j] = bound[j] + share(m, x[j], top[j]);
    }
  });
}

template <int kM>
DEVICE void blend(Seen<kM>& s, Values& y) {
  Values low = {}, high = {};
  s.each([&](int m, const Values& x) {
    const float w = s.number(m);
    UNROLL
    for (int j = 0; j < kLanes; ++j) {
      low[j] = m == 0 || x[j] < low[j] ? x[j] : low[j];
      high[j] = m == 0 || x[j] > high[j] ? x[j] : high[j];
      y[j] = m == 0 ? w * x[j] : y[j] + w * x[j];
    }
  });
  const float alpha = s.number(s.k.models);
  UNROLL
  for (int j = 0; j < kLanes; ++j) {
    const float away = alpha * (high[j] - low[j]);
    y[j] = clamped(y[j], low[j] - away, high[j] + away);
  }
}

template <Element kRule, int kM>
KERNEL_BOUNDS(kThreads, 2)
void apply_kernel(ApplyParams p) {
  View* views = simt::shared<View>();
  for (int64_t c = p.chunks.from + simt::block_idx(); c < p.chunks.to; c += simt::grid_dim()) {
    const Chunk k = open_chunk(p.plan, c, views);
    each_octet(k, [&](const Octet& o) {
      by_bound<kM>(k, o, [&](auto bound) {
        Seen<bound.value> s(p, k, o);
        Values y = {};
        if constexpr (kRule == Element::kConsensus) consensus(s, y);
        if constexpr (kRule == Element::kFisher) fisher(s, y);
        if constexpr (kRule == Element::kNearswap) nearswap_rule(s, y);
        if constexpr (kRule == Element::kMutate) mutate(s, y);
        if constexpr (kRule == Element::kPick) pick(s, false, y);
        if constexpr (kRule == Element::kPickMagnitude) pick(s, true, y);
        if constexpr (kRule == Element::kBlend) blend(s, y);
        store(k.out(), o, y, p.rounding, k.key);
      });
    });
  }
}

// Sources x, best, group_best, group_worst; extra: the velocity.
KERNEL_BOUNDS(kThreads, 2)
void swarm_kernel(ApplyParams p) {
  View* views = simt::shared<View>();
  for (int64_t c = p.chunks.from + simt::block_idx(); c < p.chunks.to; c += simt::grid_dim()) {
    const Chunk k = open_chunk(p.plan, c, views);
    const double* numbers = p.numbers + k.number * 5;
    float n[5];
    UNROLL
    for (int i = 0; i < 5; ++i) n[i] = static_cast<float>(numbers[i]);
    each_octet(k, [&](const Octet& o) {
      Bits bits[5];
      UNROLL
      for (int i = 0; i < 4; ++i) bits[i] = fetch(k.source(i), o);
      bits[4] = fetch(k.extra(0), o);
      Values x, best, group_best, group_worst, v;
      widen(bits[0], k.source(0).type, x);
      widen(bits[1], k.source(1).type, best);
      widen(bits[2], k.source(2).type, group_best);
      widen(bits[3], k.source(3).type, group_worst);
      widen(bits[4], k.extra(0).type, v);
      UNROLL
      for (int j = 0; j < kLanes; ++j) {
        v[j] = swarm_velocity(n, x[j], v[j], best[j], group_best[j], group_worst[j]);
        x[j] = x[j] + n[4] * v[j];
      }
      store(k.extra(0), o, v, Rounding::kNearest, k.key);
      store(k.out(), o, x, p.rounding, k.key);
    });
  }
}

template <Element kRule>
void add_apply(Launches& launches, const ApplyParams& p) {
  const int64_t grid = taking_turns(p.chunks.size());
  const auto add = [&](auto kernel) { launches.add(kernel, grid, kThreads, kViewBytes, p); };
  if constexpr (kRule == Element::kNearswap || kRule == Element::kMutate) {
    add(apply_kernel<kRule, 1>);
  } else if (p.plan.table.models <= 4) {
    add(apply_kernel<kRule, 4>);
  } else {
    add(apply_kernel<kRule, 0>);
  }
}

int64_t enqueue(const Apply& call, void* memory, Launches* launches) {
  const std::vector<int64_t> first = chunks_before(call.table, kChunk);
  Arena arena(memory);
  Upload upload(arena, launches);
  ApplyParams p{};
  p.plan = upload.add(call.table, kChunk, first);
  p.numbers = upload.add(call.numbers, call.table.parts * call.columns);
  p.chunks = {0, first.back()};
  p.columns = call.columns;
  p.votes = call.votes;
  p.task = call.task;
  p.rounding = call.rounding;
  if (!launches) return arena.bytes();
  upload.send();
  switch (call.element) {
    case Element::kConsensus: add_apply<Element::kConsensus>(*launches, p); break;
    case Element::kFisher: add_apply<Element::kFisher>(*launches, p); break;
    case Element::kNearswap: add_apply<Element::kNearswap>(*launches, p); break;
    case Element::kMutate: add_apply<Element::kMutate>(*launches, p); break;
    case Element::kPick: add_apply<Element::kPick>(*launches, p); break;
    case Element::kPickMagnitude: add_apply<Element::kPickMagnitude>(*launches, p); break;
    case Element::kBlend: add_apply<Element::kBlend>(*launches, p); break;
  }
  return arena.bytes();
}

int64_t enqueue(const Swarm& call, void* memory, Launches* launches) {
  Table t = call.table;
  t.extras = 1;
  t.extra = call.velocity;
  const std::vector<int64_t> first = chunks_before(t, kChunk);
  Arena arena(memory);
  Upload upload(arena, launches);
  ApplyParams p{};
  p.plan = upload.add(t, kChunk, first);
  p.numbers = upload.add(call.numbers, t.parts * 5);
  p.chunks = {0, first.back()};
  p.rounding = call.rounding;
  if (!launches) return arena.bytes();
  upload.send();
  launches->add(swarm_kernel, taking_turns(p.chunks.size()), kThreads, kViewBytes, p);
  return arena.bytes();
}

}  // namespace

int64_t workspace(const Apply& call) { return enqueue(call, nullptr, nullptr); }
int64_t workspace(const Swarm& call) { return enqueue(call, nullptr, nullptr); }

Status run(const Apply& call, void* memory, Stream stream) {
  Launches launches(stream);
  enqueue(call, memory, &launches);
  return launches.status();
}

Status run(const Swarm& call, void* memory, Stream stream) {
  Launches launches(stream);
  enqueue(call, memory, &launches);
  return launches.status();
}

}  // namespace gemma_ext::souping::cuda
