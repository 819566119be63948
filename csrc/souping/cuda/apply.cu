// SPDX-License-Identifier: Apache-2.0
// Element rules, and swarm steps.
#include "rules.cuh"

namespace gemma_ext::souping::cuda {
namespace {

template <class A, Element kRule, int kM>
KERNEL_BOUNDS(kThreads, 2)
void apply_kernel(ApplyParams p) {
  View* views = simt::shared<View>();
  for (int64_t c = p.chunks.from + simt::block_idx(); c < p.chunks.to; c += simt::grid_dim()) {
    const Chunk k = open_chunk(p.plan, c, views);
    each_octet(k, [&](const Octet& o) {
      by_bound<kM>(k, o, [&](auto bound) {
        Seen<A, bound.value> s(p, k, o);
        Values<A> y = {};
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
template <class A>
KERNEL_BOUNDS(kThreads, 2)
void swarm_kernel(ApplyParams p) {
  View* views = simt::shared<View>();
  for (int64_t c = p.chunks.from + simt::block_idx(); c < p.chunks.to; c += simt::grid_dim()) {
    const Chunk k = open_chunk(p.plan, c, views);
    A n[5];
    UNROLL
    for (int i = 0; i < 5; ++i) n[i] = static_cast<A>(p.numbers[k.number * 5 + i]);
    each_octet(k, [&](const Octet& o) {
      Bits bits[5];
      UNROLL
      for (int i = 0; i < 5; ++i) bits[i] = fetch(i < 4 ? k.source(i) : k.extra(0), o);
      Values<float> x[5];
      UNROLL
      for (int i = 0; i < 5; ++i) widen(bits[i], (i < 4 ? k.source(i) : k.extra(0)).type, x[i]);
      Values<A> moved, speed;
      UNROLL
      for (int j = 0; j < kLanes; ++j) {
        const A here = x[0][j];
        speed[j] = swarm_velocity<A>(n, here, x[4][j], x[1][j], x[2][j], x[3][j]);
        moved[j] = here + n[4] * speed[j];
      }
      store(k.extra(0), o, speed, Rounding::kNearest, k.key);
      store(k.out(), o, moved, p.rounding, k.key);
    });
  }
}

using ApplyKernel = void (*)(ApplyParams);

// Two rules have one source; of the others two are worth a kernel for few models.
template <Element kRule>
ApplyKernel kernel_of(bool wide, int models) {
  constexpr bool kOne = kRule == Element::kNearswap || kRule == Element::kMutate;
  constexpr bool kFew = kRule == Element::kConsensus || kRule == Element::kFisher;
  constexpr int kAny = kOne ? 1 : 0, kBound = kFew ? 4 : kAny;
  if (wide) return apply_kernel<double, kRule, kAny>;
  return models <= kBound ? apply_kernel<float, kRule, kBound> : apply_kernel<float, kRule, kAny>;
}

ApplyKernel kernel_of(Element element, bool wide, int models) {
  switch (element) {
    case Element::kConsensus: return kernel_of<Element::kConsensus>(wide, models);
    case Element::kFisher: return kernel_of<Element::kFisher>(wide, models);
    case Element::kNearswap: return kernel_of<Element::kNearswap>(wide, models);
    case Element::kMutate: return kernel_of<Element::kMutate>(wide, models);
    case Element::kPick: return kernel_of<Element::kPick>(wide, models);
    case Element::kPickMagnitude: return kernel_of<Element::kPickMagnitude>(wide, models);
    case Element::kBlend: break;
  }
  return kernel_of<Element::kBlend>(wide, models);
}

// kernel(wide): what the parts of a width take.
template <class Kernel>
int64_t enqueue(const Table& t, const double* numbers, int columns, ApplyParams p, void* memory,
                Launches* launches, Kernel kernel) {
  const std::vector<int64_t> first = chunks_before(t, kChunk);
  Arena arena(memory);
  Upload upload(arena, launches);
  p.plan = upload.add(t, kChunk, first);
  p.numbers = upload.add(numbers, t.parts * columns);
  p.columns = columns;
  if (!launches) return arena.bytes();
  upload.send();
  for (const Run& run : runs_of(t, false)) {
    p.chunks = {first[run.parts.from], first[run.parts.to]};
    launches->add(kernel(run.wide), taking_turns(p.chunks.size()), kThreads, kViewBytes, p);
  }
  return arena.bytes();
}

int64_t enqueue(const Apply& call, void* memory, Launches* launches) {
  ApplyParams p{};
  p.votes = call.votes;
  p.task = call.task;
  p.rounding = call.rounding;
  return enqueue(call.table, call.numbers, call.columns, p, memory, launches,
                 [&](bool wide) { return kernel_of(call.element, wide, call.table.models); });
}

int64_t enqueue(const Swarm& call, void* memory, Launches* launches) {
  Table t = call.table;
  t.extras = 1;
  t.extra = call.velocity;
  ApplyParams p{};
  p.rounding = call.rounding;
  return enqueue(t, call.numbers, 5, p, memory, launches, [](bool wide) -> ApplyKernel {
    return wide ? swarm_kernel<double> : swarm_kernel<float>;
  });
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
