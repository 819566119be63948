// SPDX-License-Identifier: Apache-2.0
#include "sort.cuh"

#include "scan.cuh"

namespace gemma_ext::sae::cuda {
namespace {

// f(place, key, valid) for the 512 neighbours of a warp, 32 at a time; all lanes call.
template <class F>
DEVICE void each_key(const SortParams& p, F f) {
  const int64_t first = int64_t{simt::block_idx()} * kSortItems +
                        simt::warp_idx() * (kSortRounds * simt::kWarpSize) + simt::lane_idx();
  for (int r = 0; r < kSortRounds; ++r) {
    const int64_t at = first + r * simt::kWarpSize;
    const bool valid = at < p.count;
    f(at, valid ? p.from.key[at] : 0, valid);
  }
}

DEVICE int digit_of(const SortParams& p, uint32_t key) {
  return static_cast<int>(key >> p.shift & (kDigits - 1));
}

KERNEL_BOUNDS(kThreads, 4)
void count_digits_kernel(SortParams p) {
  int* s_count = simt::shared<int>();
  const int t = simt::thread_idx();
  s_count[t] = 0;
  simt::sync_block();
  each_key(p, [&](int64_t, uint32_t key, bool valid) {
    if (valid) simt::atomic_add(&s_count[digit_of(p, key)], 1);
  });
  simt::sync_block();
  p.counts[int64_t{t} * simt::grid_dim() + simt::block_idx()] = s_count[t];
}

struct DigitParams {
  int *counts, *totals;
  int64_t blocks;
};

// A block per digit.
KERNEL_BOUNDS(kThreads, 4)
void scan_digits_kernel(DigitParams p) {
  int* s_warps = simt::shared<int>();
  int* counts = p.counts + simt::block_idx() * p.blocks;
  int total = 0;
  for (int64_t first = 0; first < p.blocks; first += kThreads) {
    const int64_t at = first + simt::thread_idx();
    const int before = total;
    const int rank = block_scan(at < p.blocks ? counts[at] : 0, s_warps, total);
    if (at < p.blocks) counts[at] = before + rank;
  }
  if (simt::thread_idx() == 0) p.totals[simt::block_idx()] = total;
}

struct PlaceShared {
  int place[kWarps][kDigits];
  int warps[kWarps];
};

KERNEL_BOUNDS(kThreads, 4)
void place_keys_kernel(SortParams p) {
  PlaceShared* s = simt::shared<PlaceShared>();
  const int t = simt::thread_idx(), warp = simt::warp_idx();
  UNROLL
  for (int w = 0; w < kWarps; ++w) s->place[w][t] = 0;
  int all = 0;
  int place = block_scan(p.totals[t], s->warps, all);
  place += p.counts[int64_t{t} * simt::grid_dim() + simt::block_idx()];
  each_key(p, [&](int64_t, uint32_t key, bool valid) {
    if (valid) simt::atomic_add(&s->place[warp][digit_of(p, key)], 1);
  });
  simt::sync_block();
  UNROLL
  for (int w = 0; w < kWarps; ++w) {
    const int own = s->place[w][t];
    s->place[w][t] = place;
    place += own;
  }
  simt::sync_block();
  each_key(p, [&](int64_t at, uint32_t key, bool valid) {
    const int digit = digit_of(p, key);
    unsigned equal = simt::ballot(valid);
    UNROLL
    for (int b = 0; b < kDigitBits; ++b) {
      const bool set = digit >> b & 1;
      const unsigned votes = simt::ballot(set);
      equal &= set ? votes : ~votes;
    }
    const int rank = simt::popcount(equal & ((1u << simt::lane_idx()) - 1));
    const int to = s->place[warp][digit] + rank;
    simt::sync_warp();  // all have read
    if (valid && equal >> simt::lane_idx() == 1) s->place[warp][digit] = to + 1;
    simt::sync_warp();
    if (valid) p.to.key[to] = key;
    if (valid) p.to.id[to] = p.from.id[at];
  });
}

}  // namespace

void add_sort(Launches& launches, const SortMemory& m) {
  for (int pass = 0; pass < m.passes; ++pass) {
    const SortParams p{m.keys[pass % 2], m.keys[1 - pass % 2], m.counts, m.totals,
                       m.count,          pass * kDigitBits};
    launches.add(count_digits_kernel, m.blocks, kThreads, kDigits * sizeof(int), p);
    launches.add(scan_digits_kernel, m.blocks ? kDigits : 0, kThreads, kWarps * sizeof(int),
                 {m.counts, m.totals, m.blocks});
    launches.add(place_keys_kernel, m.blocks, kThreads, sizeof(PlaceShared), p);
  }
}

}  // namespace gemma_ext::sae::cuda
