// SPDX-License-Identifier: Apache-2.0
#include "features.cuh"

namespace gemma_ext::sae::cuda {
namespace {

struct NameParams {
  List list;
  Levels levels;
  Keys to;
  int* token;
  float* d_values;
};

// Of an entry: its token or nobody, whether it names a feature, its level.
struct Name {
  int64_t token;
  int index, level;
  bool owned, valid;

  DEVICE Name(const NameParams& p, int64_t e) : index(0), level(0) {
    owned = token_of(p.list, e, token);
    if (owned) index = p.list.indices[e];
    valid = owned && is_feature(p.list, index);
    if (valid && p.levels.count > 0)
      level = p.levels.of(p.list, e - entries_of(p.list, token).begin, index);
  }
  DEVICE bool counts(const Levels& levels) const {
    return valid && (levels.count == 0 || level < levels.count);
  }
};

KERNEL_BOUNDS(kThreads, 4)
void name_entries_kernel(NameParams p) {
  for (int64_t e = int64_t{simt::block_idx()} * kThreads + simt::thread_idx(); e < p.list.entries;
       e += int64_t{simt::grid_dim()} * kThreads) {
    const Name name(p, e);
    const int64_t levels = most(p.levels.count, 1);
    p.to.key[e] = static_cast<uint32_t>(name.counts(p.levels) ? name.index : p.list.F);
    p.to.id[e] = static_cast<int>(e);
    p.token[e] = static_cast<int>(name.token * levels + name.level);
  }
}

KERNEL_BOUNDS(kThreads, 4)
void clear_values_kernel(NameParams p) {
  for (int64_t e = int64_t{simt::block_idx()} * kThreads + simt::thread_idx(); e < p.list.entries;
       e += int64_t{simt::grid_dim()} * kThreads) {
    const Name name(p, e);
    if (!name.counts(p.levels)) p.d_values[e] = name.owned && !name.valid ? kNan : 0.0f;
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

int64_t blocks_for(int64_t threads) { return taking_turns(ceil_div(threads, kThreads)); }

NameParams name_params(const List& list, const Levels* levels) {
  return {list, levels ? *levels : Levels(), {}, nullptr, nullptr};
}

}  // namespace

void add_by_feature(Launches& launches, const List& list, const FeatureMemory& m,
                    const Levels* levels) {
  NameParams p = name_params(list, levels);
  p.to = m.sort.first();
  p.token = m.sorted.token;
  launches.add(name_entries_kernel, blocks_for(list.entries), kThreads, 0, p);
  add_sort(launches, m.sort);
  launches.add(find_starts_kernel, blocks_for(list.F + 1), kThreads, 0,
               {m.sorted.feature, m.sorted.start, list.entries, list.F});
}

void add_clear(Launches& launches, const List& list, float* d_values, const Levels* levels) {
  NameParams p = name_params(list, levels);
  p.d_values = d_values;
  launches.add(clear_values_kernel, blocks_for(list.entries), kThreads, 0, p);
}

}  // namespace gemma_ext::sae::cuda
