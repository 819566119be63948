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

// Rules that are compiled on their own: sums without an election, and what TIES does; any other.
enum class Form { kSum, kTies, kAny };

template <Form kForm>
DEVICE Rule rule_of(const Rule& rule) {
  if (kForm == Form::kSum) return {Election::kNone, true, rule.zero, Combine::kSum};
  if (kForm == Form::kTies) return {Election::kSum, true, rule.zero, Combine::kWeightedMean};
  return rule;
}

template <class A, int kM, Form kForm>
KERNEL_BOUNDS(kThreads, kM == 4 ? 2 : 1)
void merge_kernel(MergeParams p) {
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
        Ballot<A, bound.value> ballot(all, rule, *s, k, o);
        Combined<A> held[kLanes] = {};
        each_model<bound.value>(k.models, [&](int m) {
          A x[kLanes];
          const unsigned agree = ballot.of(m, x);
          UNROLL
          for (int j = 0; j < kLanes; ++j)
            combine(rule.combine, agree >> j & 1, x[j], s->coefficients.weight[m],
                    s->coefficients.alone[m], &held[j]);
        });
        A y[kLanes];
        UNROLL
        for (int j = 0; j < kLanes; ++j) {
          const A result = scale * combined(rule.combine, has_alone, held[j]);
          y[j] = k.based ? ballot.deltas.base[j] + result : result;
          if (ballot.nan >> j & 1) y[j] = static_cast<A>(from_bits(kNan));
        }
        store(k.out(), o, y, p.rounding, k.key);
      });
    });
  });
}

template <Form kForm>
void add_merge(Launches& launches, int64_t grid, const MergeParams& p) {
  const int models = p.common.plan.table.models, shared = sizeof(MergeShared<float>);
  if (models <= 4) {
    launches.add(merge_kernel<float, 4, kForm>, grid, kThreads, shared, p);
    return;
  }
  if constexpr (kForm != Form::kAny) {
    if (models <= 8) {
      launches.add(merge_kernel<float, 8, kForm>, grid, kThreads, shared, p);
      return;
    }
  }
  launches.add(merge_kernel<float, 0, kForm>, grid, kThreads, shared, p);
}

Form form_of(const Merge& call) {
  const Rule& r = call.rule;
  if (call.alone) return Form::kAny;
  if (r.election == Election::kNone && r.combine == Combine::kSum) return Form::kSum;
  const bool ties = r.election == Election::kSum && r.weighted;
  return ties && r.combine == Combine::kWeightedMean ? Form::kTies : Form::kAny;
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
    const int64_t grid = taking_turns(all.chunks.size());
    if (is_wide(call.wide, work.table().out[work.parts(b).from])) {
      launches->add(call.table.models <= 4 ? merge_kernel<double, 4, Form::kAny>
                                           : merge_kernel<double, 0, Form::kAny>,
                    grid, kThreads, sizeof(MergeShared<double>), p);
    } else if (form_of(call) == Form::kSum) {
      add_merge<Form::kSum>(*launches, grid, p);
    } else if (form_of(call) == Form::kTies) {
      add_merge<Form::kTies>(*launches, grid, p);
    } else {
      add_merge<Form::kAny>(*launches, grid, p);
    }
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
