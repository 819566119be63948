// SPDX-License-Identifier: Apache-2.0
#include "features.cuh"

namespace gemma_ext::sae::cuda {
namespace {

struct NameParams {
  List list;
  Keys to;
  int* token;
  float* dots;
};

KERNEL_BOUNDS(kThreads, 4)
void name_entries_kernel(NameParams p) {
  for (int64_t e = int64_t{simt::block_idx()} * kThreads + simt::thread_idx(); e < p.list.entries;
       e += int64_t{simt::grid_dim()} * kThreads) {
    int64_t n;
    const bool owned = token_of(p.list, e, n);
    const int index = owned ? p.list.indices[e] : -1;
    const bool taken = is_feature(p.list, index);
    p.to.key[e] = static_cast<uint32_t>(taken ? index : p.list.F);
    p.to.id[e] = static_cast<int>(e);
    p.token[e] = static_cast<int>(n);
    if (p.dots && !taken) p.dots[e] = owned ? kNan : 0.0f;
  }
}

struct StartParams {
  const uint32_t* feature;
  int* start;
  int64_t entries, F;
};

KERNEL_BOUNDS(kThreads, 4)
void find_starts_kernel(StartParams p) {
  for (int64_t f = int64_t{simt::block_idx()} * kThreads + simt::thread_idx(); f <= p.F;
       f += int64_t{simt::grid_dim()} * kThreads) {
    int64_t low = 0, high = p.entries;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (p.feature[middle] < static_cast<uint32_t>(f)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    p.start[f] = static_cast<int>(low);
  }
}

}  // namespace

void add_by_feature(Launches& launches, const List& list, const FeatureMemory& m, float* dots) {
  launches.add(name_entries_kernel, taking_turns(ceil_div(list.entries, kThreads)), kThreads, 0,
               {list, m.sort.first(), m.sorted.token, dots});
  add_sort(launches, m.sort);
  launches.add(find_starts_kernel, taking_turns(ceil_div(list.F + 1, kThreads)), kThreads, 0,
               {m.sorted.feature, m.sorted.start, list.entries, list.F});
}

}  // namespace gemma_ext::sae::cuda
