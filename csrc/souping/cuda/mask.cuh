// SPDX-License-Identifier: Apache-2.0
// Which elements of an octet count.
#pragma once

#include "ties.cuh"

namespace gemma_ext::souping::cuda {

struct MaskShared {
  CutShared cut[2];
  uint32_t reach[kMaxModels];
};

// After open_chunk, by the block, with barriers where there is a mask.
DEVICE void open_mask(const Plan& plan, const MaskPlan& mask, int64_t c, const Chunk& k,
                      MaskShared* s) {
  if (mask.density) {
    for (int m = simt::thread_idx(); m < k.models; m += simt::block_dim())
      s->reach[m] = reach(mask.density[k.number * k.models + m]);
    simt::sync_block();
  }
  NO_UNROLL
  for (int i = 0; i < 2; ++i)
    if (mask.cut[i].bits) settle_ties(plan, mask.cut[i], c, k, &s->cut[i]);
}

DEVICE const float* marks_of(const MaskPlan& mask, const Chunk& k, int m, const Octet& o) {
  return mask.marks + m * mask.stride + mask.marked[k.part] - mask.first + (o.first - k.offset);
}

// A bit for each element of model m that counts.
DEVICE_CALL unsigned kept_of(const Plan& plan, const MaskPlan& mask, const MaskShared& s,
                             const Chunk& k, int m, const Octet o) {
  unsigned kept = 0xff;
  NO_UNROLL
  for (int i = 0; i < 2; ++i) {
    const CutPlan& cut = mask.cut[i];
    if (!cut.bits) continue;
    const Bits keys = keys_of(k, cut.variance, m, o);
    const unsigned found = taken(s.cut[i], cut.variance ? 0 : m, o, keys);
    kept &= i == 0 ? found : ~found;
  }
  if (mask.density) {
    const uint32_t model = plan.table.model[k.part * k.models + m];
    const Bits words = random_words(k.key, o.first, model, kDrop);
    UNROLL
    for (int j = 0; j < kLanes; ++j)
      kept &= ~(static_cast<unsigned>(draw(words.word[j]) >= s.reach[m]) << j);
  }
  if (mask.marks) {
    const float* marks = marks_of(mask, k, m, o);
    UNROLL
    for (int j = 0; j < kLanes; ++j)
      kept &= ~(static_cast<unsigned>(o.has(j) && marks[j] == 0) << j);
  }
  return kept;
}

}  // namespace gemma_ext::souping::cuda
