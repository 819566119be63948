// SPDX-License-Identifier: Apache-2.0
#include "mask.h"

namespace gemma_ext::souping::cuda {
namespace {

struct StartParams {
  CutPlan cut[2];
  Word* ticket;
  int64_t chunks, launches;
};

constexpr int kStartThreads = 256;

KERNEL void start_cuts_kernel(StartParams p) {
  const int64_t thread = int64_t{simt::block_idx()} * kStartThreads + simt::thread_idx();
  const int64_t threads = int64_t{simt::grid_dim()} * kStartThreads;
  for (int64_t i = thread; i < p.launches; i += threads) p.ticket[i] = 0;
  UNROLL
  for (int i = 0; i < 2; ++i) {
    const CutPlan& cut = p.cut[i];
    if (!cut.bits) continue;
    for (int64_t s = thread; s < cut.groups * cut.streams; s += threads) cut.ties[s] = cut.left[s];
    for (int64_t s = thread; s < p.chunks * cut.streams; s += threads) cut.state[s] = 0;
  }
}

}  // namespace

void take_cuts(MaskPlan& plan, const Mask& mask, int models, int64_t chunks, int64_t launches,
               Arena& memory) {
  const Cut* cuts[2] = {&mask.keep, &mask.drop};
  for (int i = 0; i < 2; ++i) {
    const Cut& cut = *cuts[i];
    if (!cut.bits) continue;
    CutPlan& to = plan.cut[i];
    to.bits = cut.bits;
    to.left = cut.ties;
    to.groups = cut.groups;
    to.variance = cut.variance;
    to.streams = streams_of(cut.variance, models);
    to.ties = memory.take<int64_t>(cut.groups * to.streams);
    to.state = memory.take<Word>(chunks * to.streams);
  }
  if (mask.keep.bits || mask.drop.bits) plan.ticket = memory.take<Word>(launches);
}

void start_cuts(const MaskPlan& plan, int64_t chunks, int64_t parts, Launches& launches) {
  if (!plan.cuts() || chunks == 0) return;
  const StartParams p{{plan.cut[0], plan.cut[1]}, plan.ticket, chunks, parts};
  launches.add(start_cuts_kernel, taking_turns(ceil_div(chunks, kStartThreads)), kStartThreads, 0,
               p);
}

}  // namespace gemma_ext::souping::cuda
