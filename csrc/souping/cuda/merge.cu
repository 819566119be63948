// SPDX-License-Identifier: Apache-2.0
// Trim, elect, combine: out = base + scale result.
#include "batches.h"
#include "merge.cuh"

namespace gemma_ext::souping::cuda {
namespace {

struct MergeParams {
  MergeCommon common;
  const double* scale;
  Rounding rounding;
};

// What is compiled on its own: sums without an election, and what TIES does; any other.
enum class Form { kSum, kTies, kAny };

template <Form kForm>
DEVICE Rule rule_of(const Rule& rule) {
  if (kForm == Form::kSum) return {Election::kNone, true, rule.zero, Combine::kSum};
  if (kForm == Form::kTies) return {Election::kSum, true, rule.zero, Combine::kWeightedMean};
  return rule;
}

template <class A, int kM, Form kForm>
KERNEL_BOUNDS(kThreads, kForm == Form::kAny || kM == 8 ? 1 : 2)
void merge_kernel(const GRID_CONSTANT MergeParams p) {
  MergeShared<A>* s = simt::shared<MergeShared<A>>();
  const MergeCommon& all = p.common;
  const Rule rule = rule_of<kForm>(all.rule);
  const bool has_alone = kForm == Form::kAny && all.numbers.alone;
  each_chunk(all.chunks, all.mask.ticket, &s->dealt, [&](int64_t c) {
    const Chunk k = open_chunk(all.plan, c, s->views,
                               [&](const Chunk& k) { s->coefficients.fill(all.numbers, k); });
    open_mask(all.plan, all.mask, c, k, &s->mask);
    const A scale = static_cast<A>(p.scale[k.number]);
    each_octet(k, [&](const Octet& o) {
      by_bound<kM>(k, o, [&](auto bound) {
        const Ballot<A, bound.value, kForm == Form::kAny> ballot(all, rule, *s, k, o);
        A y[kLanes];
        each_position<bound.value>([&](int j) {
          y[j] = moved(k.based, ballot.deltas.base[j], scale, ballot.result(j, has_alone));
        });
        store(k.out(), o, y, p.rounding, k.key);
      });
    });
  });
}

using MergeKernel = void (*)(const MergeParams);

template <Form kForm>
MergeKernel kernel_of(int models) {
  if (models <= 4) return merge_kernel<float, 4, kForm>;
  if (models <= 8) return merge_kernel<float, 8, kForm>;
  return merge_kernel<float, 0, kForm>;
}

MergeKernel kernel_of(const Merge& call) {
  const Rule& r = call.rule;
  const bool ties = r.election == Election::kSum && r.weighted;
  if (!call.alone && !call.mask.rescale) {
    if (r.election == Election::kNone && r.combine == Combine::kSum)
      return kernel_of<Form::kSum>(call.table.models);
    if (ties && r.combine == Combine::kWeightedMean)
      return kernel_of<Form::kTies>(call.table.models);
  }
  return merge_kernel<float, 0, Form::kAny>;
}

int64_t enqueue(const Merge& call, void* memory, Launches* launches) {
  const int64_t parts = call.table.parts, numbers = parts * call.table.models;
  Batches work(call.table, call.mask, kChunk, false);
  Arena arena(memory);
  Upload upload(arena, launches);
  MergeParams p{};
  MergeCommon& all = p.common;
  all.plan.grain = kChunk;
  all.rule = call.rule;
  work.add(upload, all.plan, all.mask);
  all.mask.density = upload.add(call.mask.rows ? nullptr : call.mask.density, numbers);
  all.numbers = {upload.add(call.weights, numbers), upload.add(call.divide, numbers),
                 upload.add(call.alone, numbers)};
  p.scale = upload.add(call.scale, parts);
  p.rounding = call.rounding;
  work.take(arena, all.mask);
  if (!launches) return arena.bytes();
  upload.send();
  const MaskPlan mask = all.mask;
  work.start(mask, *launches);
  for (int64_t b = 0; b < work.size(); ++b) {
    all.mask = work.begin(b, all.plan, mask, *launches);
    all.chunks = work.chunks(b);
    const bool wide = is_wide(call.wide, work.table().out[work.parts(b).from]);
    launches->add(wide ? merge_kernel<double, 0, Form::kAny> : kernel_of(call),
                  taking_turns(all.chunks.size()), kThreads,
                  wide ? sizeof(MergeShared<double>) : sizeof(MergeShared<float>), p);
  }
  return arena.bytes();
}

}  // namespace

int64_t workspace(const Merge& call) { return enqueue(call, nullptr, nullptr); }

Status run(const Merge& call, void* memory, Stream stream) {
  Launches launches(stream);
  enqueue(call, memory, &launches);
  return launches.status();
}

}  // namespace gemma_ext::souping::cuda
