// SPDX-License-Identifier: Apache-2.0
// Which elements at a cut's threshold it takes: so many, the first ones by position. Every chunk counts its own and
// looks back over the chunks before it (Merrill and Garland 2016); blocks take chunks in order, so that those are
// done or at work. Sums of integers: the same on every run.
//
// The state of a chunk is one word: 0, or kCounted and its own number, or kSummed and that of all up to its end.
#pragma once

#include "chunk.cuh"
#include "mask.h"

namespace gemma_ext::souping::cuda {

constexpr Word kCounted = Word{1} << 62, kSummed = Word{1} << 63, kValue = kCounted - 1;
// A number of ties that nobody counts down: all.
constexpr int64_t kAllTies = INT64_MAX / 2;
constexpr int64_t kEverywhere = INT64_MAX;

struct CutShared {
  uint32_t bits[kMaxModels];
  int64_t limit[kMaxModels];  // equals count at positions below; negative: the -limit first do
  unsigned equal[kMaxModels];
};

DEVICE Bits keys_of(const float (&x)[kLanes]) {
  Bits keys;
  UNROLL
  for (int j = 0; j < kLanes; ++j) keys.word[j] = magnitude(x[j]);
  return keys;
}

// Of the variance, in the order of element.h.
DEVICE_CALL Bits variance_keys(const Chunk& k, const Octet o) {
  Deltas<float, 0> deltas(k, o);
  float x[kMaxModels];
  Bits keys;
  NO_UNROLL
  for (int j = 0; j < kLanes; ++j) {
    for (int m = 0; m < k.models; ++m) x[m] = deltas.at(m, j);
    keys.word[j] = magnitude(variance<0>(x, k.models));
  }
  return keys;
}

// Keys of one stream of an octet.
DEVICE Bits keys_of(const Chunk& k, bool by_variance, int stream, const Octet& o) {
  if (by_variance) return variance_keys(k, o);
  float d[kLanes];
  load_delta(k, stream, o, d);
  return keys_of(d);
}

DEVICE unsigned equals(const Bits& keys, const Octet& o, uint32_t bits) {
  unsigned found = 0;
  UNROLL
  for (int j = 0; j < kLanes; ++j)
    found |= static_cast<unsigned>(o.has(j) && keys.word[j] == bits) << j;
  return found;
}

// How many equals of a stream lie in the chunks of its group before chunk c; by a whole warp. `own` is the chunk's,
// `opens` says that it is the group's first.
DEVICE int64_t equals_before(Word* state, int streams, int64_t c, unsigned own, bool opens,
                             int64_t first) {
  Word* mine = state + c * streams;
  int64_t before = 0;
  if (!opens) {
    if (simt::lane_idx() == 0) simt::atomic_exchange(mine, kCounted | own);
    for (int64_t end = c;; end -= simt::kWarpSize) {
      const int64_t i = end - 1 - simt::lane_idx();
      Word word = i < first ? Word{kSummed} : Word{0};
      while (simt::any(word == 0)) {
        if (word == 0) word = simt::atomic_add(state + i * streams, Word{0});
      }
      const unsigned summed = simt::ballot((word & kSummed) != 0);
      const int last = simt::popcount((summed & (0u - summed)) - 1);  // the nearest; 32: none
      const int64_t value = simt::lane_idx() <= last ? static_cast<int64_t>(word & kValue) : 0;
      // a chunk's own number has 32 bits, the sum does not
      before += simt::reduce_add(simt::lane_idx() < last ? static_cast<unsigned>(value) : 0u);
      if (last == simt::kWarpSize) continue;
      const unsigned low = simt::shfl(static_cast<unsigned>(value), last);
      const unsigned high = simt::shfl(static_cast<unsigned>(value >> 32), last);
      before += static_cast<int64_t>(Word{high} << 32 | low);
      break;
    }
  }
  if (simt::lane_idx() == 0) simt::atomic_exchange(mine, kSummed | static_cast<Word>(before + own));
  simt::sync_warp();
  return before;
}

// The position behind the `wanted`-th equal of a stream in the chunk; by the block, with barriers.
DEVICE void find_limit(const Chunk& k, const CutPlan& cut, int stream, CutShared* s) {
  const int64_t wanted = -s->limit[stream];
  const uint32_t bits = s->bits[stream];
  unsigned* totals = s->equal;  // by warp
  simt::sync_block();
  int64_t before = 0;
  for (int64_t q0 = k.begin / kLanes; q0 * kLanes < k.end; q0 += simt::block_dim()) {
    const Octet o = octet_of(q0 + simt::thread_idx(), k.begin, k.end);
    unsigned mine = 0;
    if (o.first < k.end) {
      mine = equals(keys_of(k, cut.variance, stream, o), o, bits);
    }
    unsigned up_to = simt::popcount(mine);
    UNROLL
    for (int step = 1; step < simt::kWarpSize; step *= 2) {
      const unsigned other = simt::shfl_up(up_to, step);
      if (simt::lane_idx() >= step) up_to += other;
    }
    if (simt::lane_idx() == simt::kWarpSize - 1) totals[simt::warp_idx()] = up_to;
    simt::sync_block();
    int64_t at = before + up_to - simt::popcount(mine);
    for (int w = 0; w < simt::block_dim() / simt::kWarpSize; ++w) {
      if (w < simt::warp_idx()) at += totals[w];
      before += totals[w];
    }
    UNROLL
    for (int j = 0; j < kLanes; ++j)
      if (mine >> j & 1 && ++at == wanted) s->limit[stream] = o.first + j + 1;
    simt::sync_block();
  }
}

// Fills `s` for chunk c; by the block, with barriers.
DEVICE_CALL void settle_ties(const Plan& plan, const CutPlan& cut, int64_t c, const Chunk& k,
                             CutShared* s) {
  const int64_t row = cut.groups > 1 ? k.number : 0;
  const int64_t* ties = cut.ties + row * cut.streams;
  bool counts = false;
  for (int m = 0; m < cut.streams; ++m) counts |= ties[m] > 0 && ties[m] < kAllTies;
  for (int m = simt::thread_idx(); m < cut.streams; m += simt::block_dim()) {
    s->bits[m] = static_cast<uint32_t>(cut.bits[row * cut.streams + m]);
    s->limit[m] = ties[m] > 0 ? kEverywhere : 0;
    s->equal[m] = 0;
  }
  simt::sync_block();
  if (!counts) return;
  for (int m = 0; m < cut.streams; ++m) {
    if (ties[m] <= 0 || ties[m] >= kAllTies) continue;
    unsigned mine = 0;
    each_octet(k, [&](const Octet& o) {
      mine += simt::popcount(equals(keys_of(k, cut.variance, m, o), o, s->bits[m]));
    });
    mine = simt::reduce_add(mine);
    if (simt::lane_idx() == 0 && mine > 0) simt::atomic_add(&s->equal[m], mine);
  }
  simt::sync_block();
  const int64_t parts = plan.table.parts;
  const int64_t first = cut.groups > 1 ? plan.first[k.part] : 0;
  const int64_t end = cut.groups > 1 ? plan.first[k.part + 1] : plan.first[parts];
  for (int m = simt::warp_idx(); m < cut.streams; m += simt::block_dim() / simt::kWarpSize) {
    if (ties[m] <= 0 || ties[m] >= kAllTies) continue;
    const unsigned own = s->equal[m];
    const int64_t before = equals_before(cut.state + m, cut.streams, c, own, c == first, first);
    const int64_t wanted = ties[m] - before;
    if (simt::lane_idx() == 0) {
      s->limit[m] = wanted <= 0 ? 0 : wanted >= own ? kEverywhere : -wanted;
      if (c + 1 == end) cut.left[row * cut.streams + m] = most(wanted - own, 0);
    }
  }
  simt::sync_block();
  for (int m = 0; m < cut.streams; ++m) {
    // the same for all threads: find_limit begins with a barrier before it writes
    if (s->limit[m] < 0) find_limit(k, cut, m, s);
  }
}

// Of the keys of an octet those that a cut takes, a bit for each.
DEVICE unsigned taken(const CutShared& s, int stream, const Octet& o, const Bits& keys) {
  const uint32_t bits = s.bits[stream];
  const int limit = static_cast<int>(most(least(s.limit[stream] - o.first, kLanes), 0));
  unsigned found = 0;
  UNROLL
  for (int j = 0; j < kLanes; ++j) {
    const uint32_t floor = bits + (j >= limit);
    found |= static_cast<unsigned>(keys.word[j] >= floor && keys.word[j] != kNoKey) << j;
  }
  return found;
}

}  // namespace gemma_ext::souping::cuda
