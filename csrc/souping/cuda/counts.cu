// SPDX-License-Identifier: Apache-2.0
#include "batches.h"
#include "merge.cuh"

namespace gemma_ext::souping::cuda {
namespace {

struct CountsParams {
  MergeCommon common;
  Word* out;  // [T, M, 2] or [T]
};

struct CountsShared {
  MergeShared<float> merge;
  unsigned count[2 * kMaxModels];
};

// How often a model's mask stands alone, and with others.
KERNEL_BOUNDS(kThreads, 2)
void count_overlaps_kernel(const GRID_CONSTANT CountsParams p) {
  CountsShared* s = simt::shared<CountsShared>();
  MergeShared<float>& merge = s->merge;
  const MergeCommon& all = p.common;
  const MaskPlan& mask = all.mask;
  each_chunk(all.chunks, mask.ticket, &merge.dealt, [&](int64_t c) {
    const Chunk k = open_chunk(all.plan, c, merge.views, [&](const Chunk& k) {
      for (int i = simt::thread_idx(); i < 2 * k.models; i += kThreads) s->count[i] = 0;
    });
    open_mask(all.plan, mask, c, k, &merge.mask);
    each_octet(k, [&](const Octet& o) {
      unsigned there = 0, once = 0, more = 0;
      UNROLL
      for (int j = 0; j < kLanes; ++j) there |= static_cast<unsigned>(o.has(j)) << j;
      uint8_t kept[kMaxModels];
      for (int m = 0; m < k.models; ++m) {
        const unsigned mine = there & kept_of(all.plan, mask, merge.mask, k, m, o);
        more |= once & mine;
        once |= mine;
        kept[m] = static_cast<uint8_t>(mine);
      }
      for (int m = 0; m < k.models; ++m) {
        const unsigned mine = kept[m];
        const int alone = simt::popcount(mine & ~more), others = simt::popcount(mine & more);
        if (alone) simt::atomic_add(&s->count[2 * m], static_cast<unsigned>(alone));
        if (others) simt::atomic_add(&s->count[2 * m + 1], static_cast<unsigned>(others));
      }
    });
    simt::sync_block();
    for (int i = simt::thread_idx(); i < 2 * k.models; i += kThreads)
      if (s->count[i]) simt::atomic_add(&p.out[k.number * 2 * k.models + i], Word{s->count[i]});
  });
}

// Elected signs added up.
KERNEL_BOUNDS(kThreads, 2)
void count_balance_kernel(const GRID_CONSTANT CountsParams p) {
  MergeShared<float>* s = simt::shared<MergeShared<float>>();
  const MergeCommon& all = p.common;
  Rule rule = all.rule;
  rule.zero = 0;
  each_chunk(all.chunks, all.mask.ticket, &s->dealt, [&](int64_t c) {
    const Chunk k = open_chunk(all.plan, c, s->views,
                               [&](const Chunk& k) { s->coefficients.fill(all.numbers, k); });
    open_mask(all.plan, all.mask, c, k, &s->mask);
    int balance = 0;
    each_octet(k, [&](const Octet& o) {
      const Ballot<float, 0, true> ballot(all, rule, *s, k, o);
      float sorted[kMaxModels];
      for (int j = o.from; j < o.to; ++j) balance += static_cast<int>(ballot.elected(j, sorted));
    });
    balance = simt::reduce_add(balance);
    if (simt::lane_idx() == 0 && balance != 0)
      simt::atomic_add(&p.out[k.number], static_cast<Word>(int64_t{balance}));
  });
}

int64_t enqueue(const Counts& call, void* memory, Launches* launches) {
  const int64_t numbers = call.table.parts * call.table.models;
  Batches work(call.table, call.mask, kChunk, false);
  Arena arena(memory);
  Upload upload(arena, launches);
  CountsParams p{};
  MergeCommon& all = p.common;
  all.plan.grain = kChunk;
  all.rule = call.rule;
  work.add(upload, all.plan, all.mask);
  all.mask.density = upload.add(call.mask.rows ? nullptr : call.mask.density, numbers);
  all.numbers = {upload.add(call.weights, numbers), upload.add(call.divide, numbers), nullptr};
  p.out = reinterpret_cast<Word*>(call.out);
  work.take(arena, all.mask);
  if (!launches) return arena.bytes();
  upload.send();
  const MaskPlan mask = all.mask;
  work.start(mask, *launches);
  for (int64_t b = 0; b < work.size(); ++b) {
    all.mask = work.begin(b, all.plan, mask, *launches);
    all.chunks = work.chunks(b);
    const int64_t grid = taking_turns(all.chunks.size());
    if (call.count == Count::kOverlaps) {
      launches->add(count_overlaps_kernel, grid, kThreads, sizeof(CountsShared), p);
    } else {
      launches->add(count_balance_kernel, grid, kThreads, sizeof(MergeShared<float>), p);
    }
  }
  return arena.bytes();
}

}  // namespace

int64_t workspace(const Counts& call) { return enqueue(call, nullptr, nullptr); }

Status run(const Counts& call, void* memory, Stream stream) {
  Launches launches(stream);
  enqueue(call, memory, &launches);
  return launches.status();
}

}  // namespace gemma_ext::souping::cuda
