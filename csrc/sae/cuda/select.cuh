// SPDX-License-Identifier: Apache-2.0
// The k best of a row's candidates by a block: ranks are told apart eight bits at a time until what is left is wanted
// whole.
#pragma once

#include "candidates.cuh"
#include "scan.cuh"

namespace gemma_ext::sae::cuda {

// How a list compares.
struct Order {
  const float* scale;   // [F] or null
  const uint8_t* mask;  // [F] features that take part, or null: all
  bool by_magnitude;

  DEVICE float score(const Candidate& c) const {
    const float size = by_magnitude ? fabsf(c.p) : c.p;
    return scale ? size * scale[c.feature] : size;
  }
  DEVICE uint64_t rank(const Candidate& c) const { return rank_of(score(c), c.feature); }
};

// Candidates of a row: those kept, those that came since; or p of its first features.
struct Source {
  const Candidate *kept, *fresh;
  int kept_count, fresh_count;
  const float* dense;
  int dense_count;

  // f(candidate) for each, by the block; f may not have barriers.
  template <class F>
  DEVICE void each(const Order& order, F f) const {
    const auto take = [&](const Candidate& c) {
      if (!order.mask || order.mask[c.feature]) f(c);
    };
    for (int i = simt::thread_idx(); i < dense_count; i += kThreads) take({dense[i], i});
    for (int i = simt::thread_idx(); i < kept_count; i += kThreads) take(kept[i]);
    for (int i = simt::thread_idx(); i < fresh_count; i += kThreads) take(fresh[i]);
  }
};

constexpr int kBins = 256;
static_assert(kBins == kThreads);

struct SelectShared {
  int bins[kBins], warps[kWarps];
  uint64_t least;  // rank that the chosen have at least
  int wanted, taken;
  uint32_t floor;
  bool done;
};

// The rank that the k best have at least, 0 where there are no more than k. By the block.
DEVICE uint64_t least_rank(const Source& from, const Order& order, int k, SelectShared* s) {
  const int t = simt::thread_idx();
  uint64_t prefix = 0;
  int wanted = k;
  for (int shift = 56; shift >= 0; shift -= 8) {
    s->bins[t] = 0;
    simt::sync_block();
    from.each(order, [&](const Candidate& c) {
      const uint64_t rank = order.rank(c);
      // the bits above this digit are those of the prefix
      if (shift < 56 && (rank ^ prefix) >> (shift + 8) != 0) return;
      simt::atomic_add(&s->bins[rank >> shift & (kBins - 1)], 1);
    });
    simt::sync_block();
    const int bin = kBins - 1 - t, own = s->bins[bin];
    int total = 0;
    const int above = block_scan(own, s->warps, total);
    if (shift == 56 && total <= k) return 0;
    if (above < wanted && wanted <= above + own) {
      s->least = prefix | static_cast<uint64_t>(bin) << shift;
      s->wanted = wanted - above;
      s->done = own == wanted - above;
    }
    simt::sync_block();
    prefix = s->least;
    wanted = s->wanted;
    const bool done = s->done;
    simt::sync_block();
    if (done) break;
  }
  return prefix;
}

// The k best to `to`, in no order; returns how many. `floor`: order_of the least score of them, 0 where there are
// fewer than k. By the block.
DEVICE int keep_best(const Source& from, const Order& order, int k, Candidate* to, uint32_t* floor,
                     SelectShared* s) {
  const uint64_t least = least_rank(from, order, k, s);
  if (simt::thread_idx() == 0) {
    s->taken = 0;
    s->floor = 0xffffffffu;
  }
  simt::sync_block();
  from.each(order, [&](const Candidate& c) {
    const uint64_t rank = order.rank(c);
    if (rank < least) return;
    to[simt::atomic_add(&s->taken, 1)] = c;
    simt::atomic_min(&s->floor, static_cast<uint32_t>(rank >> 32));
  });
  simt::sync_block();
  const int taken = s->taken;
  if (simt::thread_idx() == 0) *floor = taken < k ? 0 : s->floor;
  simt::sync_block();
  return taken;
}

// Room to sort `size`, a power of two.
struct SortRoom {
  uint64_t* rank;
  float* p;
  int size;

  static int size_for(int64_t k) {
    int size = 1;
    while (size < k) size *= 2;
    return size;
  }
  HOST_DEVICE static int64_t bytes(int64_t size) { return size * 12; }
  DEVICE static SortRoom at(uint8_t* memory, int size) {
    return {reinterpret_cast<uint64_t*>(memory), reinterpret_cast<float*>(memory + 8 * size), size};
  }
};

constexpr int kMostSorted = 2048;  // in shared memory, of which some cards have 99 KiB

// Descending, by the block.
DEVICE void sort(const SortRoom& room) {
  for (int run = 2; run <= room.size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int i = simt::thread_idx(); i < room.size / 2; i += kThreads) {
        const int a = i / step * 2 * step + i % step, b = a + step;
        const bool descends = (a & run) == 0;
        if ((room.rank[a] < room.rank[b]) != descends) continue;
        const uint64_t rank = room.rank[a];
        const float p = room.p[a];
        room.rank[a] = room.rank[b];
        room.p[a] = room.p[b];
        room.rank[b] = rank;
        room.p[b] = p;
      }
      simt::sync_block();
    }
  }
}

DEVICE int32_t feature_of(uint64_t rank) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank));
}

// The k best in their order: values and indices, behind the last 0. By the block.
DEVICE void write_best(const Source& from, const Order& order, int k, const SortRoom& room,
                       float* values, int32_t* indices, SelectShared* s) {
  const uint64_t least = least_rank(from, order, k, s);
  if (simt::thread_idx() == 0) s->taken = 0;
  simt::sync_block();
  from.each(order, [&](const Candidate& c) {
    const uint64_t rank = order.rank(c);
    if (rank < least) return;
    const int at = simt::atomic_add(&s->taken, 1);
    room.rank[at] = rank;
    room.p[at] = c.p;
  });
  simt::sync_block();
  const int taken = s->taken;
  for (int i = taken + simt::thread_idx(); i < room.size; i += kThreads) room.rank[i] = 0;
  simt::sync_block();
  sort(room);
  for (int i = simt::thread_idx(); i < k; i += kThreads) {
    const bool there = i < taken;
    values[i] = there ? room.p[i] : 0.0f;
    indices[i] = there ? feature_of(room.rank[i]) : 0;
  }
  simt::sync_block();
}

}  // namespace gemma_ext::sae::cuda
